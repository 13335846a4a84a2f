// The most likely token of each row of logits, and whether the row is finite, in one pass over memory.
#pragma once

#include "rows.cuh"

struct GreedyArgs {
  const float* logits;  // [num_rows, vocab_size], contiguous
  int64_t* choices;     // [2, num_rows]: token ids, then 1 where all of the row is finite, else 0
  cudaStream_t stream;
  int32_t num_rows, vocab_size;
};

constexpr int kGreedyWarps = 16;
constexpr int kGreedyThreads = kGreedyWarps * kWarpThreads;

// The best of some logits of a row; of several equal ones, the lowest id. zero: 0, or NaN where one is not finite.
struct Choice {
  float logit = -INFINITY, zero = 0.0f;
  int token_id = 0;

  // Ids are seen in ascending order.
  __device__ __forceinline__ void see(float next_logit, int next_id) {
    const bool is_better = next_logit > logit;
    logit = is_better ? next_logit : logit;
    token_id = is_better ? next_id : token_id;
    zero += next_logit * 0.0f;
  }

  __device__ __forceinline__ void merge(const Choice& other) {
    const bool is_better = other.logit > logit || (other.logit == logit && other.token_id < token_id);
    logit = is_better ? other.logit : logit;
    token_id = is_better ? other.token_id : token_id;
    zero += other.zero;
  }
};
constexpr int kGreedySharedBytes = (kGreedyWarps * sizeof(Choice) + 15) / 16 * 16;

// Over a warp's lanes, the same for all of them.
__device__ __forceinline__ Choice warp_choice(Choice choice) {
#pragma unroll
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) {
    Choice other;
    other.logit = __shfl_xor_sync(0xFFFFFFFFu, choice.logit, mask);
    other.zero = __shfl_xor_sync(0xFFFFFFFFu, choice.zero, mask);
    other.token_id = __shfl_xor_sync(0xFFFFFFFFu, choice.token_id, mask);
    choice.merge(other);
  }
  return choice;
}

// Grid: [num_rows].
template <int kWidth>
__global__ void __launch_bounds__(kGreedyThreads) greedy_kernel(GreedyArgs args) {
  const int row = blockIdx.x, warp = threadIdx.x / kWarpThreads;
  const float* logits = args.logits + static_cast<int64_t>(row) * args.vocab_size;
  Choice choice;
#pragma unroll 4
  for (int i = threadIdx.x; i < args.vocab_size / kWidth; i += kGreedyThreads) {
    const Chunk<float, kWidth> chunk(logits, i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) choice.see(chunk.values[j], i * kWidth + j);
  }
  choice = warp_choice(choice);
  Choice* of_warps = reinterpret_cast<Choice*>(dynamic_shared_memory());
  if (threadIdx.x % kWarpThreads == 0) of_warps[warp] = choice;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kGreedyWarps; ++other) choice.merge(of_warps[other]);
  args.choices[row] = choice.token_id;
  args.choices[args.num_rows + row] = choice.zero == 0.0f;
}
