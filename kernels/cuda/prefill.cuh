// Attention of many query rows: each warp has a tile of them, or two, and all share the tokens' tiles as they stream
// by.
#pragma once

#include "decode.cuh"

// Two where their sums have room in the registers: keys and values are then read, and unpacked, half as often; shared
// memory gives them no faster than tensor cores take them for one.
constexpr int kPrefillRowTiles = !kIsFloat32 && kHeadDim <= 128 ? 2 : 1;
constexpr int kPrefillWarps = kRowBytes > 512 ? 2 : 4;
constexpr int kPrefillThreads = kPrefillWarps * kWarpThreads;
constexpr int kPrefillWarpRows = kPrefillRowTiles * kTileRows;
constexpr int kPrefillRows = kPrefillWarps * kPrefillWarpRows;
constexpr int kPrefillTokens = kIsFloat32 || kIsScaled ? 16 : 32;  // scores of more spill beside unpacked elements

// Shared memory: the ring, then the queries.
constexpr int kPrefillQueryBytes = kPrefillRows * kRowBytes;
constexpr int kPrefillTileBytes = stage_bytes(kPrefillTokens);
constexpr int kPrefillStages = 3 * kPrefillTileBytes + kPrefillQueryBytes <= kMaxSharedBytes ? 3 : 2;
using PrefillRing = TileRing<kPrefillTokens, kPrefillStages, kPrefillThreads>;
constexpr int kPrefillSharedBytes = PrefillRing::kBytes + kPrefillQueryBytes;
static_assert(kPrefillSharedBytes <= kMaxSharedBytes);
using PrefillQueries = TileMath<kPrefillRowTiles>::Queries;

// The query rows of an item.
struct QueryRows : HeadRows {
  int first_query, first_position;

  __device__ __forceinline__ QueryRows(const AttentionArgs& args, const PrefillItem& item, int kv_head)
      : HeadRows(args, item.num_queries, kv_head),
        first_query(item.query_start),
        first_position(position_of(args, item.seq, item.query_start)) {}

  __device__ __forceinline__ int query(int row) const { return first_query + token(row); }
  __device__ __forceinline__ int position(int row) const { return first_position + token(row); }
};

// Writes the lane's share of a tile of rows, which are the item's rows from first_row on.
__device__ __forceinline__ void write_row_tile(const RowSums& sums, const AttentionArgs& args, const QueryRows& rows,
                                                int first_row) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int which = 0; which < kLaneRows; ++which) {
    const int row = first_row + lane_row(lane, which);
    if (row >= rows.num_rows) continue;
    Element* out = static_cast<Element*>(args.out) + rows.head_index(rows.query(row), row) * kHeadDim;
    const float share = 1.0f / sums.total[which];
#pragma unroll
    for (int tile = 0; tile < kSumTiles; tile += kStripTiles) {
      Strip<kStripTiles * 2> strip;
#pragma unroll
      for (int i = 0; i < kStripTiles * 2; ++i) {
        const float sum = sums.sums[tile + i % kStripTiles][2 * which + i / kStripTiles];
        strip.elements[i] = from_float<Element>(sum * share);
      }
      strip.store(out + lane_dim(lane, tile, 0));
    }
  }
}

// Grid: [num_prefill_items, num_kv_heads].
__global__ void __launch_bounds__(kPrefillThreads, 2) prefill_kernel(AttentionArgs args) {
  const PrefillItem item = args.prefill_items[blockIdx.x];
  const int kv_head = blockIdx.y, warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const QueryRows rows(args, item, kv_head);
  const PagedHead head(args, item.seq, kv_head);
  const TokenRange visible = visible_tokens(args, item.kv_start, item.kv_end, rows.first_position);
  const PrefillRing ring = {reinterpret_cast<KV*>(dynamic_shared_memory()), static_cast<int>(threadIdx.x)};
  Element* query_tile = reinterpret_cast<Element*>(dynamic_shared_memory() + PrefillRing::kBytes);

  int token = visible.begin / kTileTokens * kTileTokens;
#pragma unroll
  for (int stage = 0; stage < kPrefillStages - 1; ++stage) {
    const int first = token + stage * kPrefillTokens;
    ring.start(stage, head, ring.find(head, first, visible), first, visible);
  }
  PrefillRing::Blocks blocks = ring.find(head, token + (kPrefillStages - 1) * kPrefillTokens, visible);
  load_queries<kPrefillRows, kPrefillThreads>(query_tile, args, rows);
  __syncthreads();

  const int first_row = warp * kPrefillWarpRows;
  const int last_position = rows.position(first_row + kPrefillWarpRows - 1);
  const bool has_rows = first_row < rows.num_rows;
  RowSums sums[kPrefillRowTiles];
  PrefillQueries queries[kPrefillRowTiles];
  Sight sights[kPrefillRowTiles];
#pragma unroll
  for (int i = 0; i < kPrefillRowTiles; ++i) {
    const int first = first_row + i * kTileRows;
    queries[i] = PrefillQueries(query_tile + first * kHeadDim);
    sights[i] = {{rows.position(first + lane_row(lane, 0)), rows.position(first + lane_row(lane, 1))},
                 args.sliding_window};
  }
  for (int stage = 0; token < visible.end; token += kPrefillTokens, stage = PrefillRing::after(stage)) {
    ring.wait();
    __syncthreads();  // the tile is there for all threads, and all are done with the one that is overwritten next
    const int next = token + (kPrefillStages - 1) * kPrefillTokens;
    ring.start(PrefillRing::before(stage), head, blocks, next, visible);
    blocks = ring.find(head, next + kPrefillTokens, visible);
    if (!has_rows || token > last_position) continue;
    const Tile tile = {ring.keys(stage), ring.values(stage), ring.scales(stage), token};
    attend_tile<kPrefillTokens>(sums, queries, tile, args, sights);
  }
  wait_for_copies<0>();
#pragma unroll
  for (int i = 0; i < kPrefillRowTiles; ++i) {
    sums[i].finish();
    if (has_rows) write_row_tile(sums[i], args, rows, first_row + i * kTileRows);
  }
}
