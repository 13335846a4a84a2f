// SiLU(gate) * up, ahead of a product.
#pragma once

#include "rows.cuh"

struct GateArgs {
  const void* gate_up;  // [num_rows, 2, size], contiguous: gates, then what they open
  void* y;              // [num_rows, size], contiguous
  cudaStream_t stream;
  int32_t num_rows, size;
};

// Grid: [num_rows, parts of a row], each part a chunk per thread.
template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) gate_kernel(GateArgs args) {
  using RowChunk = Chunk<Element, kWidth>;
  const int64_t row = blockIdx.x;
  const int i = blockIdx.y * kRowThreads + threadIdx.x;
  if (i >= args.size / kWidth) return;
  const Element* gate_up = static_cast<const Element*>(args.gate_up) + row * 2 * args.size;
  const RowChunk gate(gate_up, i);
  RowChunk up(gate_up + args.size, i);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) up.values[j] *= gate.values[j] / (1.0f + expf(-gate.values[j]));
  up.store(static_cast<Element*>(args.y) + row * args.size, i);
}
