// How a warp holds a tile of scores or sums in registers, and the softmax over it that never sees all scores at once.
#pragma once

#include "layout.cuh"

// As the MMA instruction has it: tile[n][i] is of row lane / 4 + 8 * (i / 2), column 8 * n + lane % 4 * 2 + i % 2. The
// four lanes of a quad hold two rows.
template <int kColumns>
using Fragment = float[kColumns / 8][4];

template <int kColumns>
__device__ __forceinline__ void clear(Fragment<kColumns>& fragment) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[n][i] = 0.0f;
  }
}

constexpr int kSumTiles = kHeadDim / 8;
constexpr int kLaneRows = 2;
// 8-bit elements are unpacked for tensor cores in pairs: of 16 dimensions, first the even ones, then the odd ones.
constexpr bool kEvensFirst = kIsScaled && !kIsFloat32;

__device__ __forceinline__ int lane_row(int lane, int which) { return lane / 4 + 8 * which; }
__device__ __forceinline__ int lane_column(int lane, int tile, int i) { return 8 * tile + lane % 4 * 2 + i % 2; }

// Tiles of sums of which a lane has dimensions that lie side by side: those of the first columns, then of the second.
constexpr int kStripTiles = kEvensFirst ? 2 : 1;

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

// Weights are powers of two, 2^(score * factor), the factor being positive. What rows keep of scores, their largest, is
// times the factor; -inf where a row has seen nothing.
__device__ __forceinline__ float weight_factor(const AttentionArgs& args) {
  constexpr float kLog2E = 1.44269504088896341f;
  return kHasSoftCap ? kLog2E : args.scale * kLog2E;
}

__device__ __forceinline__ float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

// Of a sum whose largest score was `part`, beside one whose largest is `max`.
__device__ __forceinline__ float weight_of(float part, float max) { return exp2_approximate(part - shift_of(max)); }

// What a row has summed up: sums of weight * value, and each row's largest score and sum of weights. `total` is of the
// lane's own columns until `finish`.
struct RowSums {
  Fragment<kHeadDim> sums = {};
  float max[kLaneRows] = {-INFINITY, -INFINITY};
  float total[kLaneRows] = {};

  // Scores become weights, relative to the largest score so far. What was summed before shrinks to match, if there is a
  // row of the tile whose largest is another one than before: mostly there is none.
  template <int kTokens>
  __device__ __forceinline__ void weigh(Fragment<kTokens>& scores, float factor) {
    float shrink[kLaneRows];
#pragma unroll
    for (int which = 0; which < kLaneRows; ++which) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n][2 * which], scores[n][2 * which + 1]));
      }
      largest = fmaxf(max[which], quad_max(largest) * factor);
      shrink[which] = weight_of(max[which], largest);
      max[which] = largest;
      total[which] *= shrink[which];
      const float shift = shift_of(largest);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 2 * which; i < 2 * which + 2; ++i) {
          scores[n][i] = exp2_approximate(fmaf(scores[n][i], factor, -shift));
          total[which] += scores[n][i];
        }
      }
    }
    if (!__any_sync(0xFFFFFFFFu, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < kSumTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
    }
  }

  __device__ __forceinline__ void finish() {
    for (int which = 0; which < kLaneRows; ++which) total[which] = quad_sum(total[which]);
  }
};

// What a lane's rows of a tile see.
struct Sight {
  int positions[kLaneRows];
  int sliding_window;

  // Whether they see all of these tokens: nothing is to be hidden then, as in most tiles.
  __device__ __forceinline__ bool is_of_all(int first_token, int num_tokens) const {
    const int lowest = min(positions[0], positions[1]), highest = max(positions[0], positions[1]);
    return first_token + num_tokens <= lowest + 1 && (!kHasWindow || first_token > highest - sliding_window);
  }

  // Writes `hidden` where a row must not see the token. The fragment's first column is token first_token.
  template <int kTokens>
  __device__ __forceinline__ void hide(Fragment<kTokens>& fragment, int first_token, float hidden) const {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = positions[i / 2], token = first_token + lane_column(lane, n, i);
        const bool is_hidden = token > position || (kHasWindow && token <= position - sliding_window);
        if (is_hidden) fragment[n][i] = hidden;
      }
    }
  }
};

// Products of query and key become scores as a model with a cap has them.
template <int kTokens>
__device__ __forceinline__ void cap_scores(Fragment<kTokens>& products, const AttentionArgs& args) {
  const float scale = args.scale / args.soft_cap;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[n][i] = args.soft_cap * tanhf(products[n][i] * scale);
  }
}

// Products with the elements of keys become those with keys; weights of values, those of their elements. scales:
// [kTokens], anything where a row must not see the token.
template <int kTokens>
__device__ __forceinline__ void apply_scales(Fragment<kTokens>& fragment, const float* scales) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[n][i] *= scales[lane_column(lane, n, i)] * kUnit;
  }
}
