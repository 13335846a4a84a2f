// What kernels over whole rows share: chunks of a row, and sums over the threads that work on one.
#pragma once

#include <type_traits>

#include "variant.cuh"

constexpr int kRowWarps = 8;
constexpr int kRowThreads = kRowWarps * kWarpThreads;
constexpr int kRowSharedBytes = kRowWarps * sizeof(float);

// kWidth elements of a row in float32: one element, or 16 bytes of them, which lie at a multiple of 16 bytes.
template <typename E, int kWidth>
struct Chunk {
  using Word = std::conditional_t<kWidth == 1, E, uint4>;
  static_assert(sizeof(Word) == kWidth * sizeof(E));

  float values[kWidth];

  __device__ __forceinline__ Chunk(const E* row, int index) {
    const Word word = reinterpret_cast<const Word*>(row)[index];
    E elements[kWidth];
    memcpy(elements, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(elements[i]);
  }

  __device__ __forceinline__ void store(E* row, int index) const {
    E elements[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) elements[i] = from_float<E>(values[i]);
    Word word;
    memcpy(&word, elements, sizeof(word));
    reinterpret_cast<Word*>(row)[index] = word;
  }
};

// Over a warp's lanes, the same for all of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, mask));
  return x;
}

// Over a block of kRowThreads, the same for all of them. Shared memory: kRowSharedBytes.
__device__ __forceinline__ float block_sum(float x) {
  float* sums = reinterpret_cast<float*>(dynamic_shared_memory());
  x = warp_sum(x);
  if (threadIdx.x % kWarpThreads == 0) sums[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kRowWarps; ++warp) total += sums[warp];
  return total;
}
