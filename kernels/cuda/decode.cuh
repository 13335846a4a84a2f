// Attention of few query rows over many tokens.
//
// The rows that share a KV head (its group, times the tokens of a cluster) fill one tile of the MMA. Warps take the
// KV's tiles in turn, each with a ring of its own and no barrier between them, and are merged at the end. Where a query
// is done in parts, the last part to arrive merges all, in order: which one that is changes nothing. Nor does it matter
// to a row which others fill its tile: blocks that several sequences share are read once for all of them.
#pragma once

#include "attend.cuh"
#include "merge.cuh"

// Shared memory: the warps' rings, and over them, once they are done with, what the warps have summed; then the
// queries, and a flag for each token.
constexpr int kDecodeQueryBytes = kTileRows * kRowBytes;
constexpr int kDecodeFlagBytes = kTileRows * sizeof(int);
constexpr int kDecodeRoom = kMaxSharedBytes - kDecodeQueryBytes - kDecodeFlagBytes;
constexpr int kDecodeTileBytes = stage_bytes(kTileTokens);

// As many warps as have room with three stages each, up to four; then as many stages as have room, up to four.
constexpr int count_decode_warps(int most) {
  return most == 1 || most * 3 * kDecodeTileBytes <= kDecodeRoom ? most : count_decode_warps(most / 2);
}
constexpr int kDecodeWarps = count_decode_warps(4);
constexpr int kDecodeStagesInRoom = kDecodeRoom / (kDecodeWarps * kDecodeTileBytes);
constexpr int kDecodeStages = kDecodeStagesInRoom < 4 ? kDecodeStagesInRoom : 4;
static_assert(kDecodeStages >= 2);
constexpr int kDecodeThreads = kDecodeWarps * kWarpThreads;
using DecodeRing = TileRing<kTileTokens, kDecodeStages, kWarpThreads>;
constexpr int kDecodeRingBytes = kDecodeWarps * DecodeRing::kBytes;
constexpr int kDecodeSharedBytes = kDecodeRingBytes + kDecodeQueryBytes + kDecodeFlagBytes;
constexpr int kWarpSums = kTileRows * kSumStride;
constexpr int kWarpStats = kTileRows * 2;
static_assert(kDecodeWarps * (kWarpSums + kWarpStats) * sizeof(float) <= kDecodeRingBytes);
static_assert(kDecodeSharedBytes <= kMaxSharedBytes);

struct DecodeShared {
  char* bytes = dynamic_shared_memory();

  __device__ __forceinline__ KV* ring(int warp) const {
    return reinterpret_cast<KV*>(bytes + warp * DecodeRing::kBytes);
  }
  __device__ __forceinline__ float* sums(int warp) const { return reinterpret_cast<float*>(bytes) + warp * kWarpSums; }
  __device__ __forceinline__ float* stats(int warp) const { return sums(kDecodeWarps) + warp * kWarpStats; }
  __device__ __forceinline__ Element* queries() const { return reinterpret_cast<Element*>(bytes + kDecodeRingBytes); }
  __device__ __forceinline__ int* are_last() const {
    return reinterpret_cast<int*>(bytes + kDecodeRingBytes + kDecodeQueryBytes);
  }
};

// The query rows of a cluster.
struct ClusterRows : HeadRows {
  const DecodeItem* items;
  const AttentionArgs& args;

  __device__ __forceinline__ ClusterRows(const AttentionArgs& args_, const DecodeItem* items_, int kv_head)
      : HeadRows(args_, items_->cluster_size, kv_head), items(items_), args(args_) {}

  __device__ __forceinline__ const DecodeItem& item(int row) const { return items[token(row)]; }
  __device__ __forceinline__ int query(int row) const { return item(row).query; }
  __device__ __forceinline__ int position(int row) const { return position_of(args, item(row).seq, item(row).query); }

  // Whether any token is done in parts.
  __device__ __forceinline__ bool are_split() const {
    for (int i = 0; i < items->cluster_size; ++i) {
      if (items[i].num_parts > 1) return true;
    }
    return false;
  }
};

// One warp's share of the tokens `visible`. The first tiles are under way before the queries are loaded.
__device__ __forceinline__ void decode_tiles(RowSums (&sums)[1], const AttentionArgs& args, const DecodeShared& shared,
                                             const ClusterRows& rows, const PagedHead& head, TokenRange visible) {
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const DecodeRing ring = {shared.ring(warp), lane};
  constexpr int kStep = kDecodeWarps * kTileTokens;
  int token = visible.begin / kTileTokens * kTileTokens + warp * kTileTokens;
#pragma unroll
  for (int stage = 0; stage < kDecodeStages - 1; ++stage) {
    const int first = token + stage * kStep;
    ring.start(stage, head, ring.find(head, first, visible), first, visible);
  }
  DecodeRing::Blocks blocks = ring.find(head, token + (kDecodeStages - 1) * kStep, visible);
  load_queries<kTileRows, kDecodeThreads>(shared.queries(), args, rows);
  __syncthreads();

  const TileMath<1>::Queries queries[] = {TileMath<1>::Queries(shared.queries())};
  const Sight sights[] = {
      {{rows.position(lane_row(lane, 0)), rows.position(lane_row(lane, 1))}, args.sliding_window}};
  for (int stage = 0; token < visible.end; token += kStep, stage = DecodeRing::after(stage)) {
    ring.wait();
    __syncwarp();  // the tile is there for all lanes, and all are done with the one that is overwritten next
    const int next = token + (kDecodeStages - 1) * kStep;
    ring.start(DecodeRing::before(stage), head, blocks, next, visible);
    blocks = ring.find(head, next + kStep, visible);
    const Tile tile = {ring.keys(stage), ring.values(stage), ring.scales(stage), token};
    attend_tile<kTileTokens>(sums, queries, tile, args, sights);
  }
  sums[0].finish();
}

// What the block's warps have summed of one row.
__device__ __forceinline__ Parts warp_parts(const DecodeShared& shared, int row) {
  return {shared.sums(0) + row * kSumStride, shared.stats(0) + row * 2, kDecodeWarps, kWarpSums, kWarpStats};
}

// What the parts of a row's token have summed of it.
__device__ __forceinline__ Parts token_parts(const AttentionArgs& args, const ClusterRows& rows, int row) {
  const DecodeItem& item = rows.item(row);
  const int64_t first = rows.head_index(item.first_partial, row);
  return {args.partial_sums + first * kHeadDim, args.partial_stats + first * 2, item.num_parts,
          static_cast<int64_t>(args.num_heads) * kHeadDim, static_cast<int64_t>(args.num_heads) * 2};
}

// Calls visit(row, dim) for each kMergeWidth dimensions of the cluster's rows, spread over the block's threads.
template <typename Visit>
__device__ __forceinline__ void for_each_strip(const ClusterRows& rows, Visit visit) {
  constexpr int kStrips = kHeadDim / kMergeWidth;
  for (int i = threadIdx.x; i < rows.num_rows * kStrips; i += kDecodeThreads) {
    visit(i / kStrips, i % kStrips * kMergeWidth);
  }
}

__device__ __forceinline__ void write_out(const AttentionArgs& args, const ClusterRows& rows, int row, int dim,
                                          const Merged& merged) {
  const int64_t head = rows.head_index(rows.query(row), row);
  const float share = 1.0f / merged.total;
  Strip<kMergeWidth> strip;
#pragma unroll
  for (int i = 0; i < kMergeWidth; ++i) strip.elements[i] = from_float<Element>(merged.sums[i] * share);
  strip.store(static_cast<Element*>(args.out) + head * kHeadDim + dim);
}

__device__ __forceinline__ void write_partial(const AttentionArgs& args, const ClusterRows& rows, int row, int dim,
                                              const Merged& merged) {
  const DecodeItem& item = rows.item(row);
  const int64_t head = rows.head_index(item.first_partial + item.part, row);
  *reinterpret_cast<float4*>(args.partial_sums + head * kHeadDim + dim) = merged.strip();
  if (dim == 0) {
    args.partial_stats[head * 2] = merged.max;
    args.partial_stats[head * 2 + 1] = merged.total;
  }
}

// Notes of each token whether this block is the last to have written a part of it; then it can read all of them.
// Returns whether it is of any, to all threads alike.
__device__ __forceinline__ bool count_arrivals(const AttentionArgs& args, const DecodeShared& shared,
                                               const ClusterRows& rows, int kv_head) {
  __threadfence();
  __syncthreads();
  const int token = threadIdx.x;
  if (token < rows.items->cluster_size) {
    const DecodeItem& item = rows.items[token];
    bool is_last = false;
    if (item.num_parts > 1) {
      int32_t* arrivals = args.arrivals + static_cast<int64_t>(item.first_partial) * args.num_kv_heads + kv_head;
      is_last = atomicAdd(arrivals, 1) == item.num_parts - 1;
      if (is_last) *arrivals = 0;  // for the next launch
    }
    shared.are_last()[token] = is_last;
  }
  __syncthreads();
  bool is_any_last = false;
  for (int i = 0; i < rows.items->cluster_size; ++i) is_any_last |= shared.are_last()[i] != 0;
  if (is_any_last) __threadfence();  // this fence is dear: it empties the L1 cache
  return is_any_last;
}

__device__ __forceinline__ void decode_cluster(const AttentionArgs& args, const DecodeItem* items, int kv_head) {
  const DecodeShared shared;
  const int warp = threadIdx.x / kWarpThreads;
  const ClusterRows rows(args, items, kv_head);
  const TokenRange visible = visible_tokens(args, items->kv_start, items->kv_end, rows.position(0));
  RowSums sums[1];
  decode_tiles(sums, args, shared, rows, PagedHead(args, items->seq, kv_head), visible);
  wait_for_copies<0>();
  __syncthreads();  // no warp needs its ring any more
  store_part(sums[0], shared.sums(warp), shared.stats(warp));
  __syncthreads();
  for_each_strip(rows, [&](int row, int dim) {
    const Merged merged = merge(warp_parts(shared, row), dim);
    if (rows.item(row).num_parts == 1) {
      write_out(args, rows, row, dim, merged);
    } else {
      write_partial(args, rows, row, dim, merged);
    }
  });
  if (!rows.are_split()) return;
  if (!count_arrivals(args, shared, rows, kv_head)) return;
  for_each_strip(rows, [&](int row, int dim) {
    if (!shared.are_last()[rows.token(row)]) return;
    write_out(args, rows, row, dim, merge(token_parts(args, rows, row), dim));
  });
}

// Grid: [num_units, num_kv_heads]. The grid's size is chosen once; how much each unit does is read from the device.
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(AttentionArgs args) {
  const int unit = blockIdx.x, kv_head = blockIdx.y;
  const DecodeItem* items = args.decode_items + args.unit_starts[unit];
  for (; items < args.decode_items + args.unit_starts[unit + 1]; items += items->cluster_size) {
    __syncthreads();  // the cluster before is done with shared memory
    decode_cluster(args, items, kv_head);
  }
}
