// Moves tiles into shared memory: queries by plain loads, keys and values by asynchronous copies that run ahead.
#pragma once

#include "layout.cuh"

// The rows, then rows of zeros up to kRows. Seen after the next barrier of the block.
template <int kRows, int kThreads, typename Rows>
__device__ __forceinline__ void load_queries(Element* tile, const AttentionArgs& args, const Rows& rows) {
  const Element* query = static_cast<const Element*>(args.query);
  for (int i = threadIdx.x; i < kRows * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    uint4 loaded = {0, 0, 0, 0};
    if (row < rows.num_rows) {
      loaded = *reinterpret_cast<const uint4*>(query + rows.query_offset(rows.query(row), row) + chunk * kChunkElements);
    }
    *reinterpret_cast<uint4*>(tile + tile_offset(row, chunk)) = loaded;
  }
}

// A ring of stages in shared memory through which kThreads threads stream tiles of kTokens tokens, keys and values.
// kStages - 1 tiles are under way while one is used. Each stage is [2, kTokens, kHeadDim].
template <int kTokens, int kStages, int kThreads>
struct TileRing {
  static constexpr int kTileElements = kTokens * kHeadDim;
  static constexpr int kBytes = kStages * 2 * kTileElements * sizeof(Element);

  Element* stages;
  int thread;  // of kThreads

  __device__ __forceinline__ Element* keys(int stage) const { return stages + stage * 2 * kTileElements; }
  __device__ __forceinline__ Element* values(int stage) const { return keys(stage) + kTileElements; }

  // Starts the copy of tokens first_token to first_token + kTokens - 1, zeros for those outside `visible`: unwritten
  // slots may hold NaN, and 0 * NaN would reach the sums. Ends a group even if nothing of the tile is visible.
  __device__ __forceinline__ void start(int stage, const PagedHead& head, int first_token, TokenRange visible) const {
    if (first_token < visible.end) {
#pragma unroll
      for (int part = 0; part < kTokens; part += kTileTokens) {
        const bool has_any = first_token + part < visible.end && first_token + part + kTileTokens > visible.begin;
        const int64_t source = has_any ? head.offset(first_token + part) : 0;
#pragma unroll 4
        for (int i = thread; i < kTileTokens * kRowChunks; i += kThreads) {
          const int token = i / kRowChunks, chunk = i % kRowChunks;
          const int64_t from = source + token * kHeadDim + chunk * kChunkElements;
          const int to = tile_offset(part + token, chunk);
          const bool is_visible = visible.contains(first_token + part + token);
          copy_async_16(keys(stage) + to, head.keys + from, is_visible);
          copy_async_16(values(stage) + to, head.values + from, is_visible);
        }
      }
    }
    commit_copies();
  }

  // The oldest tile has arrived in this thread's view; a barrier shows it to the others.
  __device__ __forceinline__ void wait() const { wait_for_copies<kStages - 2>(); }
};
