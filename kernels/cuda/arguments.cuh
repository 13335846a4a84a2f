// What the host passes, field by field as kernels/cuda/library.py has it.
#pragma once

#include "variant.cuh"

// Some query tokens of one sequence and the tokens that they attend to, or a part of those; done once per KV head.
struct Item {
  int32_t seq;
  int32_t query_start, num_queries;  // rows of the query
  int32_t kv_start, kv_end;          // tokens of the sequence; kv_start is a multiple of block_size
  int32_t partial;                   // its first row among the partial results; -1: it writes the output itself
  int32_t first_partial;             // that of the first part of the same query tokens
  int32_t num_parts;                 // parts of the same query tokens; the next part's rows follow this part's
};

struct AttentionArgs {
  const void* query;  // [num_tokens, num_heads, head_dim]; tokens are query_stride elements apart
  void* out;          // [num_tokens, num_heads, head_dim], contiguous
  const void* keys;   // [num_blocks, num_kv_heads, block_size, head_dim], as values
  const void* values;
  const int32_t* block_tables;  // [num_seqs, block_table_stride]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const Item* decode_items;     // of at most kTileRows query rows per KV head
  const int32_t* unit_starts;   // [num_units + 1]: unit i does decode items unit_starts[i] to unit_starts[i + 1] - 1
  const Item* prefill_items;    // [num_prefill_items], of at most kPrefillRows query rows per KV head, in one part
  float* partial_sums;          // [num_partial_rows, num_heads, head_dim], of values weighted by exp2(score - max)
  float* partial_stats;         // [num_partial_rows, num_heads, 2]: max, and sum of weights
  int32_t* arrivals;            // [num_partial_rows, num_kv_heads]: 0 between launches
  cudaStream_t stream;
  int64_t query_stride;
  int32_t block_table_stride;
  int32_t num_units;
  int32_t num_prefill_items;
  int32_t num_heads, num_kv_heads;
  int32_t sliding_window;  // tokens
  float scale, soft_cap;
};
