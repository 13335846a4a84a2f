// Where things lie: tiles in shared memory, tokens in the pool, rows in the query.
#pragma once

#include "arguments.cuh"

// A tile in shared memory is [rows][chunks of a row], the chunks of each row permuted so that 8 consecutive rows have
// the same chunk in 8 different groups of banks: ldmatrix and 16-byte loads then meet no conflict. Rows of odd * 2^n
// chunks already differ in 8 / 2^n places; the xor supplies the other 2^n.
template <typename E>
constexpr int kSwizzle = power_of_two_in(kRowChunksOf<E>, 8);

// Element offset of a chunk in a tile of E.
template <typename E>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  const int group = chunk / kSwizzle<E> * kSwizzle<E>;
  const int within = (chunk ^ row / (8 / kSwizzle<E>)) % kSwizzle<E>;
  return (row * kRowChunksOf<E> + group + within) * kChunkOf<E>;
}

// A thread's place in a tile of E, and those that are constants away: what the swizzle does to them the compiler knows.
template <typename E>
struct TilePlace {
  int first;  // element offset of the chunk

  __device__ __forceinline__ TilePlace(int row, int chunk) : first(tile_offset<E>(row, chunk)) {}

  // So many rows and chunks further on: 0, or a multiple of a power of two that the place's own row, or chunk, is
  // below.
  __device__ __forceinline__ int at(int rows, int chunks) const {
    constexpr int kGroup = kSwizzle<E>;
    const int within = (chunks ^ rows / (8 / kGroup)) % kGroup;
    return (first ^ within * kChunkOf<E>) + (rows * kRowChunksOf<E> + chunks / kGroup * kGroup) * kChunkOf<E>;
  }
};

// Tokens [begin, end) of a sequence; without a window begin is a multiple of the tile, and nobody asks for what is
// before.
struct TokenRange {
  int begin, end;

  __device__ __forceinline__ bool contains(int token) const { return token < end && (!kHasWindow || token >= begin); }

  // Whether it has any of the tokens from `first` on.
  __device__ __forceinline__ bool has_any(int first, int count) const {
    return first < end && (!kHasWindow || first + count > begin);
  }
};

// Element offset of a token in the pool's keys, and in its values: [num_blocks, num_kv_heads, kHeadBytes]. `offset` is
// the token's in its block.
__device__ __forceinline__ int64_t pool_offset(int64_t block, int offset, int num_kv_heads, int kv_head) {
  constexpr int kHeadElements = kHeadBytes / sizeof(KV);
  return (block * num_kv_heads + kv_head) * kHeadElements + offset * kHeadDim;
}

// Where elements are scaled: bytes from a token's elements to its scale.
__device__ __forceinline__ int scale_distance(int offset) { return kElementBytes - offset * (kHeadDim - kScaleBytes); }

// One KV head of one sequence in the pool.
struct PagedHead {
  const KV* keys;
  const KV* values;
  const int32_t* block_table;
  int num_kv_heads, kv_head;

  __device__ __forceinline__ PagedHead(const AttentionArgs& args, int seq, int kv_head_)
      : keys(static_cast<const KV*>(args.keys)),
        values(static_cast<const KV*>(args.values)),
        block_table(args.block_tables + static_cast<int64_t>(seq) * args.block_table_stride),
        num_kv_heads(args.num_kv_heads),
        kv_head(kv_head_) {}

  // The block of a token, which must be one of the sequence's own.
  __device__ __forceinline__ int32_t block(int token) const { return block_table[token / kBlockSize]; }

  // Element offset of a token in `keys` and `values`.
  __device__ __forceinline__ int64_t offset(int32_t its_block, int token) const {
    return pool_offset(its_block, token % kBlockSize, num_kv_heads, kv_head);
  }
};

// The query rows of some tokens: row r is head first_head + r % group_size of token r / group_size.
struct HeadRows {
  int num_rows;
  int group_size, num_heads, first_head;
  int64_t query_stride;  // elements from token to token

  __device__ __forceinline__ HeadRows(const AttentionArgs& args, int num_tokens, int kv_head)
      : group_size(args.num_heads / args.num_kv_heads), num_heads(args.num_heads), query_stride(args.query_stride) {
    num_rows = num_tokens * group_size;
    first_head = kv_head * group_size;
  }

  // The token of a row; those past the last stand where the last does.
  __device__ __forceinline__ int token(int row) const { return min(row, num_rows - 1) / group_size; }

  // Element offset in the query, whose row `query` is the token's.
  __device__ __forceinline__ int64_t query_offset(int query, int row) const {
    return query * query_stride + (first_head + row % group_size) * kHeadDim;
  }

  // Which head this is in tensors of [any, num_heads, ...] whose row `first` is the token's.
  __device__ __forceinline__ int64_t head_index(int first, int row) const {
    return static_cast<int64_t>(first) * num_heads + first_head + row % group_size;
  }
};

// Of row `query` of the query: its place in its sequence.
__device__ __forceinline__ int position_of(const AttentionArgs& args, int seq, int query) {
  return args.context_lens[seq] - (args.cu_seqlens_q[seq + 1] - query);
}

// The tokens from kv_start to kv_end that are needed from a position on: less those before its window.
__device__ __forceinline__ TokenRange visible_tokens(const AttentionArgs& args, int kv_start, int kv_end,
                                                     int first_position) {
  return {kHasWindow ? max(kv_start, first_position - args.sliding_window + 1) : kv_start, kv_end};
}
