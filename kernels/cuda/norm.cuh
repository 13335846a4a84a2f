// The root mean square norm of rows, ahead of a product.
#pragma once

#include "rows.cuh"

struct NormArgs {
  const void* x;       // [num_rows, size], contiguous
  const void* weight;  // [size]
  void* y;             // [num_rows, size], contiguous
  cudaStream_t stream;
  int32_t num_rows, size;
  float epsilon;
};

// Grid: [num_rows]. A row comes from memory once: when it is read again, to be scaled, it lies in the L1 cache.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) norm_kernel(NormArgs args) {
  using RowChunk = Chunk<Element, kWidth>;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * args.size;
  const Element* x = static_cast<const Element*>(args.x) + start;
  const Element* weight = static_cast<const Element*>(args.weight);
  Element* y = static_cast<Element*>(args.y) + start;
  const int num_chunks = args.size / kWidth;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < num_chunks; i += kRowThreads) {
    const RowChunk chunk(x, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += chunk.values[j] * chunk.values[j];
  }
  const float scale = 1.0f / sqrtf(block_sum(squares) / args.size + args.epsilon);
  for (int i = threadIdx.x; i < num_chunks; i += kRowThreads) {
    RowChunk chunk(x, i);
    const RowChunk weights(weight, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) chunk.values[j] *= scale * weights.values[j];
    chunk.store(y, i);
  }
}
