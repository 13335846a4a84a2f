// What the host passes, field by field as kernels/cuda/library.py has it.
#pragma once

#include "variant.cuh"

// Some query tokens of one sequence and the tokens that they attend to; done once per KV head.
struct PrefillItem {
  int32_t seq;
  int32_t query_start, num_queries;  // rows of the query
  int32_t kv_start, kv_end;          // tokens of the sequence; kv_start is a multiple of block_size
};

// One query token and the tokens that it attends to, or a part of those; done once per KV head. The items of a cluster
// follow one another and are done together: they have the same tokens of the KV, in the same blocks.
struct DecodeItem {
  int32_t seq;
  int32_t query;  // row of the query
  int32_t kv_start, kv_end;
  int32_t first_partial;    // the query's first row among the partial results, which has a row for each part
  int32_t part, num_parts;  // where there is one part only, it writes the output itself
  int32_t cluster_size;     // items of the cluster that begins with this one
};

struct AttentionArgs {
  const void* query;  // [num_tokens, num_heads, head_dim]; tokens are query_stride elements apart
  void* out;          // [num_tokens, num_heads, head_dim], contiguous
  const void* keys;   // [num_blocks, num_kv_heads, kHeadBytes], as values
  const void* values;
  const int32_t* block_tables;  // [num_seqs, block_table_stride]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const DecodeItem* decode_items;    // clusters of at most kTileRows query rows per KV head
  const int32_t* unit_starts;        // [num_units + 1]: unit i does decode items unit_starts[i] to unit_starts[i + 1] - 1
  const PrefillItem* prefill_items;  // [num_prefill_items], of at most kPrefillRows query rows per KV head
  float* partial_sums;   // [num_partial_rows, num_heads, head_dim], of values weighted by exp2(score - max)
  float* partial_stats;  // [num_partial_rows, num_heads, 2]: max, and sum of weights
  int32_t* arrivals;     // [num_partial_rows, num_kv_heads]: 0 between launches
  cudaStream_t stream;
  int64_t query_stride;
  int32_t block_table_stride;
  int32_t num_units;
  int32_t num_prefill_items;
  int32_t num_heads, num_kv_heads;
  int32_t sliding_window;  // tokens
  float scale, soft_cap;
};
