// Puts together what was summed over parts of a sequence, always in the order of the parts.
#pragma once

#include "fragment.cuh"

// Parts of one head's row: part i's sums [kHeadDim] at sums + i * sums_stride, its max and sum of weights at
// stats + i * stats_stride.
struct Parts {
  const float* sums;
  const float* stats;
  int num_parts;
  int64_t sums_stride, stats_stride;
};

struct Merged {
  float sum, max, total;
};

// One dimension of the merged row. A part that saw nothing has max -inf and counts for nothing.
__device__ __forceinline__ Merged merge(const Parts& parts, int dim) {
  Merged merged = {0.0f, -INFINITY, 0.0f};
  for (int i = 0; i < parts.num_parts; ++i) merged.max = fmaxf(merged.max, parts.stats[i * parts.stats_stride]);
  for (int i = 0; i < parts.num_parts; ++i) {
    const float weight = weight_of(parts.stats[i * parts.stats_stride], merged.max);
    merged.total += weight * parts.stats[i * parts.stats_stride + 1];
    merged.sum += weight * parts.sums[i * parts.sums_stride + dim];
  }
  return merged;
}

// Writes one warp's rows: sums [kTileRows, kHeadDim], stats [kTileRows, 2].
__device__ __forceinline__ void store_part(const RowSums& rows, float* sums, float* stats) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int tile = 0; tile < kSumTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[lane_row(lane, i / 2) * kHeadDim + lane_dim(lane, tile, i)] = rows.sums[tile][i];
    }
  }
  if (lane % 4 == 0) {
    for (int which = 0; which < kLaneRows; ++which) {
      stats[2 * lane_row(lane, which)] = rows.max[which];
      stats[2 * lane_row(lane, which) + 1] = rows.total[which];
    }
  }
}
