// The yardstick: how fast memory can be read at all.
#include <atomic>
#include <cstdint>

#include "elements.h"
#include "team.h"

#pragma GCC visibility push(default)

// Reads num_bytes (a multiple of 4 KiB) from `bytes`, each thread a part of its own; the sum keeps the reads alive.
extern "C" float pagoda_stream_read(const char* bytes, int64_t num_bytes, int32_t num_threads) {
  using namespace pagoda;
  constexpr int kStep = 4096, kSums = 4;
  std::atomic<float> total = 0.0f;
  const int64_t num_steps = num_bytes / kStep;
  for_units(num_threads, num_threads, [&](int64_t part) {
    Floats sums[kSums] = {};
    for (int64_t step = num_steps * part / num_threads; step < num_steps * (part + 1) / num_threads; ++step) {
      const float* floats = reinterpret_cast<const float*>(bytes + step * kStep);
      for (int i = 0; i < kStep / 4; i += kSums * kLanes) {
        for (int j = 0; j < kSums; ++j) sums[j] += load(floats + i + j * kLanes);
      }
    }
    total += sum(sums[0] + sums[1] + (sums[2] + sums[3]));
  });
  return total;
}

#pragma GCC visibility pop
