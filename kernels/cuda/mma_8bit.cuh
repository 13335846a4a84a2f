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
template <typename E, typename K>
struct EightBitMmaMath {
  using Queries = MmaQueries<E>;
  using Chunks = UnpackedChunks<E, K>;

  template <int kTokens>
  static __device__ __forceinline__ void multiply_keys(Fragment<kTokens>& products, const Queries& queries,
                                                       const K* keys) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < Queries::kSteps; step += 2) {
      uint32_t a[2][4];
      queries.get(step, a[0]);
      if (step + 1 < Queries::kSteps) queries.get(step + 1, a[1]);
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        const Chunks chunks = Chunks::template load<false>(keys, 8 * n, step);
#pragma unroll
        for (int c = 0; c < 2 && step + c < Queries::kSteps; ++c) {
          mma_16x8x16<E>(products[n], a[c], chunks.pairs[2 * c][0], chunks.pairs[2 * c][1]);
          mma_16x8x16<E>(products[n + 1], a[c], chunks.pairs[2 * c + 1][0], chunks.pairs[2 * c + 1][1]);
        }
      }
    }
  }

  template <int kTokens>
  static __device__ __forceinline__ void add_values(Fragment<kHeadDim>& sums, const Fragment<kTokens>& weights,
                                                    const K* values) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      uint32_t a[4];
      pack_weights<E>(a, weights[n], weights[n + 1]);
#pragma unroll
      for (int chunk = 0; chunk < kRowChunksOf<K>; chunk += 2) {
        const Chunks chunks = Chunks::template load<true>(values, 8 * n, chunk);
#pragma unroll
        for (int c = 0; c < 2 && chunk + c < kRowChunksOf<K>; ++c) {
          mma_16x8x16<E>(sums[2 * (chunk + c)], a, chunks.pairs[2 * c][0], chunks.pairs[2 * c + 1][0]);
          mma_16x8x16<E>(sums[2 * (chunk + c) + 1], a, chunks.pairs[2 * c][1], chunks.pairs[2 * c + 1][1]);
        }
      }
    }
  }
};
