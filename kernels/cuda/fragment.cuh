// How a warp holds a tile of scores or sums in registers, and the softmax over it that never sees all scores at once.
#pragma once

#include "layout.cuh"

// As the MMA instruction has it: tile[n][i] is of row lane / 4 + 8 * (i / 2), column 8 * n + lane % 4 * 2 + i % 2. The
// four lanes of a quad hold two rows.
template <int kColumns>
using Fragment = float[kColumns / 8][4];

constexpr int kSumTiles = kHeadDim / 8;
constexpr int kLaneRows = 2;
// 8-bit elements are unpacked for tensor cores in pairs: of 16 dimensions, first the even ones, then the odd ones.
constexpr bool kEvensFirst = kIsScaled && !kIsFloat32;

__device__ __forceinline__ int lane_row(int lane, int which) { return lane / 4 + 8 * which; }
__device__ __forceinline__ int lane_column(int lane, int tile, int i) { return 8 * tile + lane % 4 * 2 + i % 2; }

// The dimension that column i of a tile of sums is of.
__device__ __forceinline__ int lane_dim(int lane, int tile, int i) {
  return kEvensFirst ? tile / 2 * 16 + 2 * lane_column(lane, 0, i) + tile % 2 : lane_column(lane, tile, i);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// Scores are kept times log2(e), so that weights are powers of two. -inf where a row has seen nothing.
__device__ __forceinline__ float weight_of(float score, float max) {
  return exp2_approximate(score - (max == -INFINITY ? 0.0f : max));
}

// What a row has summed up: sums of weight * value, and each row's largest score and sum of weights. `total` is of the
// lane's own columns until `finish`.
struct RowSums {
  Fragment<kHeadDim> sums = {};
  float max[kLaneRows] = {-INFINITY, -INFINITY};
  float total[kLaneRows] = {};

  // Scores become weights, relative to the largest score so far; what was summed before is scaled to match.
  template <int kTokens>
  __device__ __forceinline__ void weigh(Fragment<kTokens>& scores) {
    float scale[kLaneRows];
#pragma unroll
    for (int which = 0; which < kLaneRows; ++which) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * which], scores[n][2 * which + 1]));
      }
      largest = fmaxf(max[which], quad_max(largest));
      scale[which] = weight_of(max[which], largest);
      max[which] = largest;
      total[which] *= scale[which];
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 2 * which; i < 2 * which + 2; ++i) {
          scores[n][i] = weight_of(scores[n][i], largest);
          total[which] += scores[n][i];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kSumTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= scale[i / 2];
    }
  }

  __device__ __forceinline__ void finish() {
    for (int which = 0; which < kLaneRows; ++which) total[which] = quad_sum(total[which]);
  }
};

__device__ __forceinline__ bool is_hidden(const AttentionArgs& args, int token, int position) {
  return token > position || (kHasWindow && token <= position - args.sliding_window);
}

// Turns products of query and key into scores, -inf where a row must not see the token. The fragment's first column is
// token first_token; positions are those of the lane's rows.
template <int kTokens>
__device__ __forceinline__ void score(Fragment<kTokens>& products, const AttentionArgs& args, int first_token,
                                      const int (&positions)[kLaneRows]) {
  constexpr float kLog2E = 1.44269504088896341f;
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = positions[i / 2], token = first_token + lane_column(lane, n, i);
      float scaled = products[n][i] * args.scale;
      if constexpr (kHasSoftCap) scaled = args.soft_cap * tanhf(scaled / args.soft_cap);
      products[n][i] = is_hidden(args, token, position) ? -INFINITY : scaled * kLog2E;
    }
  }
}

// Products with the elements of keys become those with keys. scales: [kTokens].
template <int kTokens>
__device__ __forceinline__ void scale_products(Fragment<kTokens>& products, const float* scales) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[n][i] *= scales[lane_column(lane, n, i)] * kUnit;
  }
}

// Weights of values become those of their elements; 0 where a row must not see the token, whose scale may be anything.
// scales: [kTokens]; the rest as in `score`.
template <int kTokens>
__device__ __forceinline__ void scale_weights(Fragment<kTokens>& weights, const float* scales,
                                              const AttentionArgs& args, int first_token,
                                              const int (&positions)[kLaneRows]) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = lane_column(lane, n, i);
      const float scaled = weights[n][i] * (scales[column] * kUnit);
      weights[n][i] = is_hidden(args, first_token + column, positions[i / 2]) ? 0.0f : scaled;
    }
  }
}
