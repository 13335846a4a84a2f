// Puts together what was summed over parts of a sequence, always in the order of the parts.
#pragma once

#include "fragment.cuh"

constexpr int kMergeWidth = 4;  // dimensions that a thread merges together
// Floats from row to row of a warp's sums: 8 more than there are, so that its rows are written to different banks.
constexpr int kSumStride = kHeadDim + 8;

// Dimensions of a row, stored together.
template <int kWidth>
struct alignas(kWidth * sizeof(Element)) Strip {
  Element elements[kWidth];

  __device__ __forceinline__ void store(Element* to) const { *reinterpret_cast<Strip*>(to) = *this; }
};

// Parts of one head's row: part i's sums [kHeadDim] at sums + i * sums_stride, its max and sum of weights at
// stats + i * stats_stride.
struct Parts {
  const float* sums;
  const float* stats;
  int num_parts;
  int64_t sums_stride, stats_stride;
};

struct Merged {
  float sums[kMergeWidth] = {}, max = -INFINITY, total = 0.0f;

  __device__ __forceinline__ float4 strip() const { return {sums[0], sums[1], sums[2], sums[3]}; }
};

// Dimensions `dim` on of the merged row. A part that saw nothing has max -inf and counts for nothing.
__device__ __forceinline__ Merged merge(const Parts& parts, int dim) {
  Merged merged;
  for (int i = 0; i < parts.num_parts; ++i) merged.max = fmaxf(merged.max, parts.stats[i * parts.stats_stride]);
  for (int i = 0; i < parts.num_parts; ++i) {
    const float weight = weight_of(parts.stats[i * parts.stats_stride], merged.max);
    merged.total += weight * parts.stats[i * parts.stats_stride + 1];
    const float4 sums = *reinterpret_cast<const float4*>(parts.sums + i * parts.sums_stride + dim);
    merged.sums[0] += weight * sums.x;
    merged.sums[1] += weight * sums.y;
    merged.sums[2] += weight * sums.z;
    merged.sums[3] += weight * sums.w;
  }
  return merged;
}

// Writes one warp's rows: sums [kTileRows, kSumStride], stats [kTileRows, 2].
__device__ __forceinline__ void store_part(const RowSums& rows, float* sums, float* stats) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int tile = 0; tile < kSumTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[lane_row(lane, i / 2) * kSumStride + lane_dim(lane, tile, i)] = rows.sums[tile][i];
    }
  }
  if (lane % 4 == 0) {
    for (int which = 0; which < kLaneRows; ++which) {
      stats[2 * lane_row(lane, which)] = rows.max[which];
      stats[2 * lane_row(lane, which) + 1] = rows.total[which];
    }
  }
}
