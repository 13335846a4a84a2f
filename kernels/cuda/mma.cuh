// Products of tiles in 16-bit elements, on tensor cores.
#pragma once

#include "fragment.cuh"

// A tile of query rows as operands of the MMA: kept in registers, or, where they have no room there, read from shared
// memory each time.
template <typename E, bool kInRegisters>
struct MmaQueries {
  static constexpr int kSteps = kHeadDim / 16;

  MmaQueries() = default;

  // tile: [kTileRows] rows in shared memory, there as long as this is used.
  __device__ __forceinline__ explicit MmaQueries(const E* tile) : tile_(tile) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load(step, registers_[step]);
    }
  }

  // Dimensions 16 * step to 16 * step + 15.
  __device__ __forceinline__ void get(int step, uint32_t (&a)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = registers_[step][i];
    } else {
      load(step, a);
    }
  }

 private:
  __device__ __forceinline__ void load(int step, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % kWarpThreads;
    if constexpr (kEvensFirst) {
      const TilePlace<E> place(lane_row(lane, 0), lane % 4 / 2);
#pragma unroll
      for (int which = 0; which < kLaneRows; ++which) {
        const E* four = tile_ + place.at(lane_row(0, which), 2 * step) + lane % 2 * 4;
        const uint2 pairs = *reinterpret_cast<const uint2*>(four);
        a[which] = (pairs.x & 0xFFFF) | pairs.y << 16;
        a[2 + which] = pairs.x >> 16 | (pairs.y & 0xFFFF0000);
      }
    } else {
      const TilePlace<E> place(lane % 16, lane / 16);
      load_matrices<false>(a, tile_ + place.at(0, 2 * step));
    }
  }

  const E* tile_;
  uint32_t registers_[kInRegisters ? kSteps : 1][4];
};

// Weights of 16 tokens as an operand, rounded to E.
template <typename E>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = pack<E>(first[0], first[1]);
  a[1] = pack<E>(first[2], first[3]);
  a[2] = pack<E>(second[0], second[1]);
  a[3] = pack<E>(second[2], second[3]);
}

// Of kRowTiles tiles of rows, which share what is read of keys and values. A template of E only so that variants in
// float32 need not compile it.
template <typename E, int kRowTiles>
struct MmaMath {
  using Queries = MmaQueries<E, kHeadDim * kRowTiles <= 128>;

  // products = queries x keys^T. keys: [kTokens] rows in shared memory.
  template <int kTokens>
  static __device__ __forceinline__ void multiply_keys(Fragment<kTokens> (&products)[kRowTiles],
                                                       const Queries (&queries)[kRowTiles], const E* keys) {
    const int lane = threadIdx.x % kWarpThreads;
    const TilePlace<E> place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) clear<kTokens>(products[tile]);
#pragma unroll
    for (int step = 0; step < Queries::kSteps; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) queries[tile].get(step, a[tile]);
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        uint32_t b[4];
        load_matrices<false>(b, keys + place.at(8 * n, 2 * step));
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<E>(products[tile][n], a[tile], b[0], b[1]);
          mma_16x8x16<E>(products[tile][n + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }

  // sums += weights x values. values: [kTokens] rows in shared memory.
  template <int kTokens>
  static __device__ __forceinline__ void add_values(RowSums (&sums)[kRowTiles],
                                                    const Fragment<kTokens> (&weights)[kRowTiles], const E* values) {
    const int lane = threadIdx.x % kWarpThreads;
    const TilePlace<E> place(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) pack_weights<E>(a[tile], weights[tile][n], weights[tile][n + 1]);
#pragma unroll
      for (int dims = 0; dims < kSumTiles; dims += 2) {
        uint32_t b[4];
        load_matrices<true>(b, values + place.at(8 * n, dims));
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<E>(sums[tile].sums[dims], a[tile], b[0], b[1]);
          mma_16x8x16<E>(sums[tile].sums[dims + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }
};
