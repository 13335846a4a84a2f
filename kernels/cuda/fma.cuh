// Products of tiles in float32, by plain fused multiply-adds, in the fragments of the MMA.
#pragma once

#include "fragment.cuh"

// A template only so that variants in 16 bits need not compile it; E is float.
template <typename E>
struct FmaMath {
  // One warp's query rows: they stay where they are, [kTileRows] rows in shared memory.
  struct Queries {
    const E* tile;

    __device__ __forceinline__ explicit Queries(const E* tile_) : tile(tile_) {}
  };

  // products = queries x keys^T. keys: [kTokens] rows in shared memory.
  template <int kTokens>
  static __device__ __forceinline__ void multiply_keys(Fragment<kTokens>& products, const Queries& queries,
                                                       const E* keys) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    }
#pragma unroll 2
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
      const float4 query[kLaneRows] = {chunk_of(queries.tile, lane_row(lane, 0), chunk),
                                       chunk_of(queries.tile, lane_row(lane, 1), chunk)};
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float4 key = chunk_of(keys, lane_column(lane, n, column), chunk);
#pragma unroll
          for (int which = 0; which < kLaneRows; ++which) {
            float& product = products[n][2 * which + column];
            product = fmaf(query[which].x, key.x, product);
            product = fmaf(query[which].y, key.y, product);
            product = fmaf(query[which].z, key.z, product);
            product = fmaf(query[which].w, key.w, product);
          }
        }
      }
    }
  }

  // sums += weights x values. values: [kTokens] rows in shared memory.
  template <int kTokens>
  static __device__ __forceinline__ void add_values(Fragment<kHeadDim>& sums, const Fragment<kTokens>& weights,
                                                    const E* values) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair) {
        const int owner = lane / 4 * 4 + pair;  // the lane of the quad that holds these tokens' weights
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float weight[kLaneRows] = {__shfl_sync(0xFFFFFFFFu, weights[n][column], owner),
                                           __shfl_sync(0xFFFFFFFFu, weights[n][2 + column], owner)};
          add_value(sums, weight, values, 8 * n + 2 * pair + column);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void add_value(Fragment<kHeadDim>& sums, const float (&weight)[kLaneRows],
                                                   const E* values, int token) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int tile = 0; tile < kSumTiles; ++tile) {
      const int dim = lane_column(lane, tile, 0);
      const E* pair = values + tile_offset(token, dim / kChunkElements) + dim % kChunkElements;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = fmaf(weight[i / 2], pair[i % 2], sums[tile][i]);
    }
  }

  static __device__ __forceinline__ float4 chunk_of(const E* tile, int row, int chunk) {
    return *reinterpret_cast<const float4*>(tile + tile_offset(row, chunk));
  }
};
