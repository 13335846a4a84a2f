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

  static __device__ __forceinline__ int after(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }
  static __device__ __forceinline__ int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }

  __device__ __forceinline__ KV* keys(int stage) const { return stages + stage * kStageElements; }
  __device__ __forceinline__ KV* values(int stage) const { return keys(stage) + kTileElements; }
  // [2, kTokens]: of keys, then of values.
  __device__ __forceinline__ float* scales(int stage) const {
    return reinterpret_cast<float*>(values(stage) + kTileElements);
  }

  // The blocks that a tile's tokens lie in; 0 where nothing is visible. To be found a tile ahead: they come from
  // memory.
  struct Blocks {
    int32_t ids[kTokens / kTileTokens];
  };

  __device__ __forceinline__ Blocks find(const PagedHead& head, int first_token, TokenRange visible) const {
    Blocks blocks;
#pragma unroll
    for (int part = 0; part < kTokens; part += kTileTokens) {
      const int token = first_token + part;
      blocks.ids[part / kTileTokens] = visible.has_any(token, kTileTokens) ? head.block(token) : 0;
    }
    return blocks;
  }

  // Starts the copy of tokens first_token to first_token + kTokens - 1, zeros for those outside `visible`: unwritten
  // slots may hold NaN, and 0 * NaN would reach the sums. Ends a group even if nothing of the tile is visible.
  __device__ __forceinline__ void start(int stage, const PagedHead& head, const Blocks& blocks, int first_token,
                                        TokenRange visible) const {
    if (first_token < visible.end) {
#pragma unroll
      for (int part = 0; part < kTokens; part += kTileTokens) {
        const int token = first_token + part;
        const int64_t source = head.offset(blocks.ids[part / kTileTokens], token);
        const TokenRange wanted = {visible.begin - token, visible.end - token};
        start_part(keys(stage) + part * kHeadDim, head.keys + source, wanted);
        start_part(values(stage) + part * kHeadDim, head.values + source, wanted);
        if constexpr (kIsScaled) {
          const int64_t from = source + scale_distance(token % kBlockSize);
          start_scales(scales(stage) + part, head, from, visible.has_any(token, kTileTokens));
        }
      }
    }
    commit_copies();
  }

  // The oldest tile has arrived in this thread's view; a barrier shows it to the others.
  __device__ __forceinline__ void wait() const { wait_for_copies<kStages - 2>(); }

 private:
  // Keys or values of kTileTokens tokens, zeros for all but those `wanted`. Where the threads together have whole rows,
  // or whole parts of one, what a thread copies is constants away from its first.
  __device__ __forceinline__ void start_part(KV* to, const KV* from, TokenRange wanted) const {
    if constexpr (kThreads % kKVRowChunks == 0 || kKVRowChunks % kThreads == 0) {
      constexpr int kChunks = kThreads < kKVRowChunks ? kThreads : kKVRowChunks, kRows = kThreads / kChunks;
      const int token = thread / kChunks, chunk = thread % kChunks;
      if (kRows > kTileTokens && token >= kTileTokens) return;
      const TilePlace<KV> place(token, chunk);
      const KV* first = opaque(from + token * kHeadDim + chunk * kChunkOf<KV>);
      const TokenRange seen = {wanted.begin - token, wanted.end - token};
#pragma unroll
      for (int row = 0; row < kTileTokens; row += kRows) {
#pragma unroll
        for (int chunks = 0; chunks < kKVRowChunks; chunks += kChunks) {
          const KV* source = first + row * kHeadDim + chunks * kChunkOf<KV>;
          copy_async_16(to + place.at(row, chunks), source, seen.contains(row));
        }
      }
    } else {
#pragma unroll  // as often as a constant says: the compiler knows nothing of `thread`
      for (int n = 0; n < (kTileChunks + kThreads - 1) / kThreads; ++n) {
        const int i = thread + n * kThreads;
        if (kTileChunks % kThreads != 0 && i >= kTileChunks) break;
        const int token = i / kKVRowChunks, chunk = i % kKVRowChunks;
        const KV* chunk_from = from + token * kHeadDim + chunk * kChunkOf<KV>;
        copy_async_16(to + tile_offset<KV>(token, chunk), chunk_from, wanted.contains(token));
      }
    }
  }

  // Scales of kTileTokens tokens, those of unwritten slots too, from byte offset `from` on; or zeros.
  __device__ __forceinline__ void start_scales(float* to, const PagedHead& head, int64_t from, bool has_any) const {
    constexpr int kChunks = kTileTokens / kChunkOf<float>;
    static_assert(2 * kChunks <= kThreads);
    if (thread >= 2 * kChunks) return;
    const bool is_value = thread >= kChunks;
    const int chunk = thread % kChunks;
    const char* plane = reinterpret_cast<const char*>(is_value ? head.values : head.keys);
    copy_async_16(to + is_value * kTokens + chunk * kChunkOf<float>, plane + from + chunk * 16, has_any);
  }
};
