// Products of tiles in 8-bit elements with 16-bit queries and weights, on tensor cores: elements become 16-bit ones on
// their way from shared memory to operands. Scales, and kUnit, are left to the caller.
#pragma once

#include "mma.cuh"

// Two chunks of 16 tokens as operands: of chunk c, tokens 8 * t on, [2 * c + t]; its even elements, then its odd ones.
template <typename E, typename K>
struct UnpackedChunks {
  uint32_t pairs[4][2];

  // As rows of the operand come tokens, or, transposed, elements. Past a row's last chunk that one is read again.
  template <bool kTransposed>
  static __device__ __forceinline__ UnpackedChunks load(const K* tile, int first_token, int first_chunk) {
    const int lane = threadIdx.x % kWarpThreads;
    const bool is_past = first_chunk + 1 == kRowChunksOf<K>;
    const TilePlace<K> place(lane % 16, is_past ? 0 : lane / 16);
    uint32_t packed[4];
    load_matrices<kTransposed>(packed, tile + place.at(first_token, first_chunk));
    UnpackedChunks chunks;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      chunks.pairs[i][0] = widen<E, K>(packed[i]);
      chunks.pairs[i][1] = widen<E, K>(packed[i] >> 8);
    }
    return chunks;
  }
};

// As MmaMath; a step of the queries is a chunk of the keys.
template <typename E, typename K, int kRowTiles>
struct EightBitMmaMath {
  using Queries = MmaQueries<E, kHeadDim * kRowTiles <= 128>;
  using Chunks = UnpackedChunks<E, K>;

  template <int kTokens>
  static __device__ __forceinline__ void multiply_keys(Fragment<kTokens> (&products)[kRowTiles],
                                                       const Queries (&queries)[kRowTiles], const K* keys) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) clear<kTokens>(products[tile]);
#pragma unroll
    for (int step = 0; step < Queries::kSteps; step += 2) {
      uint32_t a[2][kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        queries[tile].get(step, a[0][tile]);
        if (step + 1 < Queries::kSteps) queries[tile].get(step + 1, a[1][tile]);
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        const Chunks chunks = Chunks::template load<false>(keys, 8 * n, step);
#pragma unroll
        for (int c = 0; c < 2 && step + c < Queries::kSteps; ++c) {
          const auto& first = chunks.pairs[2 * c];
          const auto& second = chunks.pairs[2 * c + 1];
#pragma unroll
          for (int tile = 0; tile < kRowTiles; ++tile) {
            mma_16x8x16<E>(products[tile][n], a[c][tile], first[0], first[1]);
            mma_16x8x16<E>(products[tile][n + 1], a[c][tile], second[0], second[1]);
          }
        }
      }
    }
  }

  template <int kTokens>
  static __device__ __forceinline__ void add_values(RowSums (&sums)[kRowTiles],
                                                    const Fragment<kTokens> (&weights)[kRowTiles], const K* values) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) pack_weights<E>(a[tile], weights[tile][n], weights[tile][n + 1]);
#pragma unroll
      for (int chunk = 0; chunk < kRowChunksOf<K>; chunk += 2) {
        const Chunks chunks = Chunks::template load<true>(values, 8 * n, chunk);
#pragma unroll
        for (int c = 0; c < 2 && chunk + c < kRowChunksOf<K>; ++c) {
          const auto& first = chunks.pairs[2 * c];
          const auto& second = chunks.pairs[2 * c + 1];
#pragma unroll
          for (int tile = 0; tile < kRowTiles; ++tile) {
            mma_16x8x16<E>(sums[tile].sums[2 * (chunk + c)], a[tile], first[0], second[0]);
            mma_16x8x16<E>(sums[tile].sums[2 * (chunk + c) + 1], a[tile], first[1], second[1]);
          }
        }
      }
    }
  }
};
