// The yardstick: how fast memory can be read at all.
#include <cstdint>

#include "simd.h"

#pragma GCC visibility push(default)

// Reads num_bytes (a multiple of 4 KiB) from `bytes`, each thread a part of its own; the sum keeps the reads alive.
extern "C" float pagoda_stream_read(const char* bytes, int64_t num_bytes, int32_t num_threads) {
  using namespace pagoda;
  constexpr int kStep = 4096, kSums = 4;
  float total = 0.0f;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(+ : total)
  for (int64_t start = 0; start < num_bytes; start += kStep) {
    const float* floats = reinterpret_cast<const float*>(bytes + start);
    Floats sums[kSums] = {};
    for (int i = 0; i < kStep / 4; i += kSums * kLanes) {
      for (int j = 0; j < kSums; ++j) sums[j] += load(floats + i + j * kLanes);
    }
    total += sum(sums[0] + sums[1] + (sums[2] + sums[3]));
  }
  return total;
}

#pragma GCC visibility pop
