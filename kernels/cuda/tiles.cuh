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
    *reinterpret_cast<uint4*>(tile + tile_offset<Element>(row, chunk)) = loaded;
  }
}

// Bytes of so many tokens' keys and values, and their scales.
constexpr int stage_bytes(int num_tokens) { return 2 * num_tokens * (kKVRowBytes + kScaleBytes); }

// A ring of stages in shared memory through which kThreads threads stream tiles of kTokens tokens, keys and values.
// kStages - 1 tiles are under way while one is used. Each stage is [2, kTokens, kHeadDim]; where elements are
// scaled, then scales, [2, kTokens].
template <int kTokens, int kStages, int kThreads>
struct TileRing {
  static constexpr int kTileElements = kTokens * kHeadDim;
  static constexpr int kStageElements = stage_bytes(kTokens) / sizeof(KV);
  static constexpr int kBytes = kStages * stage_bytes(kTokens);
  static constexpr int kTileChunks = kTileTokens * kKVRowChunks;  // of keys, and of values

  KV* stages;
  int thread;  // of kThreads

  __device__ __forceinline__ KV* keys(int stage) const { return stages + stage * kStageElements; }
  __device__ __forceinline__ KV* values(int stage) const { return keys(stage) + kTileElements; }
  // [2, kTokens]: of keys, then of values.
  __device__ __forceinline__ float* scales(int stage) const {
    return reinterpret_cast<float*>(values(stage) + kTileElements);
  }

  // Starts the copy of tokens first_token to first_token + kTokens - 1, zeros for those outside `visible`: unwritten
  // slots may hold NaN, and 0 * NaN would reach the sums. Ends a group even if nothing of the tile is visible.
  __device__ __forceinline__ void start(int stage, const PagedHead& head, int first_token, TokenRange visible) const {
    if (first_token < visible.end) {
#pragma unroll
      for (int part = 0; part < kTokens; part += kTileTokens) {
        const bool has_any = first_token + part < visible.end && first_token + part + kTileTokens > visible.begin;
        const int64_t source = has_any ? head.offset(first_token + part) : 0;
#pragma unroll  // as often as a constant says: the compiler knows nothing of `thread`
        for (int n = 0; n < (kTileChunks + kThreads - 1) / kThreads; ++n) {
          const int i = thread + n * kThreads;
          if (kTileChunks % kThreads != 0 && i >= kTileChunks) break;
          const int token = i / kKVRowChunks, chunk = i % kKVRowChunks;
          const int64_t from = source + token * kHeadDim + chunk * kChunkOf<KV>;
          const int to = tile_offset<KV>(part + token, chunk);
          const bool is_visible = visible.contains(first_token + part + token);
          copy_async_16(keys(stage) + to, head.keys + from, is_visible);
          copy_async_16(values(stage) + to, head.values + from, is_visible);
        }
        if constexpr (kIsScaled) {
          const int64_t from = source + scale_distance((first_token + part) % kBlockSize);
          start_scales(scales(stage) + part, head, from, has_any);
        }
      }
    }
    commit_copies();
  }

  // The oldest tile has arrived in this thread's view; a barrier shows it to the others.
  __device__ __forceinline__ void wait() const { wait_for_copies<kStages - 2>(); }

 private:
  // Scales of kTileTokens tokens, those of unwritten slots too, from byte offset `from` on; or zeros.
  __device__ __forceinline__ void start_scales(float* to, const PagedHead& head, int64_t from, bool has_any) const {
    constexpr int kChunks = kTileTokens / kChunkOf<float>;
    for (int i = thread; i < 2 * kChunks; i += kThreads) {
      const bool is_value = i >= kChunks;
      const int chunk = i % kChunks;
      const char* plane = reinterpret_cast<const char*>(is_value ? head.values : head.keys);
      copy_async_16(to + is_value * kTokens + chunk * kChunkOf<float>, plane + from + chunk * 16, has_any);
    }
  }
};
