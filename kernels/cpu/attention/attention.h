// What the C functions take: plain structures that Python fills, one per step and one per call.
//
// Owns the layout of the interface; `binding.py` mirrors it field by field.
#pragma once

#include <cstdint>

namespace pagoda {

constexpr int kPartialStep = 32;  // whole vectors, whatever the instruction set

// What all layers of a model have in common.
struct Shape {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;  // tokens, a power of two
  float scale;     // of the scores
  float soft_cap;  // see soft_cap.h
};

// One step's work list (see work_list.py) and the tables that it refers to.
struct Work {
  int32_t num_clusters;
  int32_t num_merges;
  int32_t table_stride;    // entries between two block tables
  int32_t sliding_window;  // tokens; 0 is full attention
  int32_t num_threads;
  const int32_t* cluster_starts;  // [num_clusters + 1], into order; items of a cluster read the same KV
  const int32_t* order;           // [num_items]
  const int32_t* seqs;
  const int32_t* query_starts;
  const int32_t* num_queries;
  const int32_t* kv_starts;
  const int32_t* kv_ends;
  const int32_t* partials;
  const int32_t* merge_items;
  const int32_t* merge_counts;
  const int32_t* block_tables;  // [num_seqs, table_stride]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
};

// One layer's call. Rows of query are query_stride elements apart; all else is contiguous.
struct Call {
  const void* query;   // [num_tokens, num_heads, head_dim]
  const void* keys;    // [num_blocks, num_kv_heads], each a HeadLayout of keys
  const void* values;  // likewise
  void* output;        // [num_tokens, num_heads, head_dim]
  float* partial_sums;   // [num_partial_rows, num_heads, head_dim rounded up to kPartialStep]
  float* partial_norms;  // [num_partial_rows, num_heads, 2]: maximum of the scores (base 2), sum of the weights
  int64_t query_stride;
};

// One layer's queries, keys and values, as the projection left them. Queries are turned in place, keys and values
// written into their slots.
struct RotateCall {
  void* heads;             // [num_tokens, num_heads + 2 * num_kv_heads, head_dim], tokens heads_stride elements apart
  const void* cos;         // [num_tokens, head_dim / 2]
  const void* sin;         // likewise
  const void* query_norm;  // [head_dim], or null
  const void* key_norm;    // likewise
  void* keys;              // as in Call
  void* values;
  const int64_t* slot_mapping;  // [num_tokens]
  int64_t heads_stride;
  int64_t num_tokens;
  float norm_epsilon;
  int32_t num_threads;
};

}  // namespace pagoda
