// Products of tiles in float32, by plain fused multiply-adds, in the fragments of the MMA. Keys and values may be in
// 8-bit elements, whose scales are left to the caller.
#pragma once

#include "fragment.cuh"

// For one tile of rows. A template only so that variants in 16 bits need not compile it; E is float.
template <typename E, typename K>
struct FmaMath {
  // One warp's query rows: they stay where they are, [kTileRows] rows in shared memory.
  struct Queries {
    const E* tile;

    Queries() = default;
    __device__ __forceinline__ explicit Queries(const E* tile_) : tile(tile_) {}
  };

  // products = queries x keys^T. keys: [kTokens] rows in shared memory.
  template <int kTokens>
  static __device__ __forceinline__ void multiply_keys(Fragment<kTokens> (&products)[1], const Queries (&queries)[1],
                                                       const K* keys) {
    const int lane = threadIdx.x % kWarpThreads;
    clear<kTokens>(products[0]);
#pragma unroll 2
    for (int dim = 0; dim < kHeadDim; dim += 4) {
      const float4 query[kLaneRows] = {four_of(queries[0].tile, lane_row(lane, 0), dim),
                                       four_of(queries[0].tile, lane_row(lane, 1), dim)};
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float4 key = four_of(keys, lane_column(lane, n, column), dim);
#pragma unroll
          for (int which = 0; which < kLaneRows; ++which) {
            float& product = products[0][n][2 * which + column];
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
  static __device__ __forceinline__ void add_values(RowSums (&sums)[1], const Fragment<kTokens> (&weights)[1],
                                                    const K* values) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair) {
        const int owner = lane / 4 * 4 + pair;  // the lane of the quad that holds these tokens' weights
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float weight[kLaneRows] = {__shfl_sync(0xFFFFFFFFu, weights[0][n][column], owner),
                                           __shfl_sync(0xFFFFFFFFu, weights[0][n][2 + column], owner)};
          add_value(sums[0].sums, weight, values, 8 * n + 2 * pair + column);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void add_value(Fragment<kHeadDim>& sums, const float (&weight)[kLaneRows],
                                                   const K* values, int token) {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int tile = 0; tile < kSumTiles; ++tile) {
      const int dim = lane_column(lane, tile, 0);
      const K* pair = values + tile_offset<K>(token, dim / kChunkOf<K>) + dim % kChunkOf<K>;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = fmaf(weight[i / 2], to_float(pair[i % 2]), sums[tile][i]);
    }
  }

  // Dimensions dim to dim + 3 of a row.
  template <typename T>
  static __device__ __forceinline__ float4 four_of(const T* tile, int row, int dim) {
    const T* four = tile + tile_offset<T>(row, dim / kChunkOf<T>) + dim % kChunkOf<T>;
    if constexpr (sizeof(T) == sizeof(float)) {
      return *reinterpret_cast<const float4*>(four);
    } else {
      const uint32_t packed = *reinterpret_cast<const uint32_t*>(four);
      T elements[4];
      memcpy(elements, &packed, sizeof(packed));
      return {to_float(elements[0]), to_float(elements[1]), to_float(elements[2]), to_float(elements[3])};
    }
  }
};
