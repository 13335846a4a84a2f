// The attention of one layer: clusters of items shared out to threads, then the merges.
//
// Owns the loop over the work list. Clusters are taken in their order by whichever thread is free: results do not
// depend on who did what, nor on which items a cluster holds.
#include "attention.h"

#include "../base/team.h"
#include "decode.h"
#include "dot_tile.h"
#include "few_rows.h"
#include "prefill.h"

namespace pagoda {
namespace {

constexpr int kFewMerges = 32;  // are not worth waking other threads
constexpr int kUnitsPerThread = 8;
constexpr bool kHasDotTiles =
    kHasDots && std::is_same_v<Element, BFloat16> && (std::is_same_v<KV, BFloat16> || kIsScaled);

class Attention {
 public:
  Attention(const Shape& shape, const Work& work, const Call& call)
      : shape_(shape),
        work_(work),
        call_(call),
        group_size_(shape.num_heads / shape.num_kv_heads),
        partial_dim_((shape.head_dim + kPartialStep - 1) / kPartialStep * kPartialStep) {}

  void run() const {
    const int unit_heads = heads_per_unit(), head_units = shape_.num_kv_heads / unit_heads;
    const int num_merge_units = work_.num_merges * shape_.num_heads;
    for_units(work_.num_threads, static_cast<int64_t>(work_.num_clusters) * head_units, [=, this](int64_t unit) {
      do_cluster(unit / head_units, unit % head_units * unit_heads, unit_heads);
    });
    for_many(work_.num_threads, num_merge_units, kFewMerges, [this](int64_t unit) {
      merge(unit / shape_.num_heads, unit % shape_.num_heads);
    });
  }

 private:
  // Items that share their KV, and some KV heads.
  struct Cluster {
    const int32_t* items;
    int num_items;
    int num_rows;  // of each head
    int first_head, num_heads;
  };

  // KV heads that a thread does one after the other: all, where there are enough clusters for all threads to end
  // together. What it reads next is then known while it still computes.
  int heads_per_unit() const {
    int count = shape_.num_kv_heads;
    while (count > 1 && work_.num_clusters * (shape_.num_kv_heads / count) < kUnitsPerThread * work_.num_threads) {
      do --count;
      while (shape_.num_kv_heads % count);
    }
    return count;
  }

  template <bool has_dot_tiles = kHasDotTiles>  // else none is compiled
  void do_cluster(int cluster, int first_head, int num_heads) const {
    const int32_t* items = work_.order + work_.cluster_starts[cluster];
    const int num_items = work_.cluster_starts[cluster + 1] - work_.cluster_starts[cluster];
    // By the sequence's query tokens, not the item's: a prompt's last tile is summed like its others.
    const int seq = work_.seqs[items[0]];
    const bool is_prompt = work_.cu_seqlens_q[seq + 1] - work_.cu_seqlens_q[seq] > 1;
    if constexpr (has_dot_tiles) {
      const bool is_worth_unpacking = is_prompt || group_size_ > kMaxRows;  // not by rows: those are of a batch
      if (shape_.head_dim % kTokenTile == 0 && (!kIsScaled || is_worth_unpacking)) {
        return attend_by_dots<DotTile>({items, num_items, rows_of(items, num_items), first_head, num_heads});
      }
    }
    for (int kv_head = first_head; kv_head < first_head + num_heads; ++kv_head) {
      if (is_prompt) {
        for (int i = 0; i < num_items; ++i) prefill(items[i], kv_head);
      } else {
        decode_in_tiles(items, num_items, kv_head);
      }
    }
  }

  // Rows are (item, query token, head of the group).
  int rows_of(const int32_t* items, int num_items) const {
    int num_rows = 0;
    for (int i = 0; i < num_items; ++i) num_rows += work_.num_queries[items[i]] * group_size_;
    return num_rows;
  }

  template <class Tile>
  void attend_by_dots(const Cluster& cluster) const {
    [[maybe_unused]] const SmallIsZero small_is_zero;
    if constexpr (!kIsScaled) {
      if (cluster.num_rows <= kFewRows) return attend_few<1>(cluster);
    }
    thread_local Scratch scratch;
    LinesAhead ahead(partition(cluster), cluster.num_heads, Tile::share_of_reading(cluster.num_rows, shape_.head_dim));
    for_heads(cluster, [&] { return Tile(cluster.num_rows, shape_, scratch); },
              [&](Tile& tile, const Partition& kv) { tile.attend(kv, ahead); });
  }

  template <int kRows>
  void attend_few(const Cluster& cluster) const {
    if constexpr (kRows < kFewRows) {
      if (cluster.num_rows > kRows) return attend_few<2 * kRows>(cluster);
    }
    for_heads(cluster, [&] { return FewRowsTile<kRows>(cluster.num_rows, shape_); },
              [](FewRowsTile<kRows>& tile, const Partition& kv) { tile.attend(kv); });
  }

  template <class MakeTile, class Attend>
  void for_heads(const Cluster& cluster, MakeTile make_tile, Attend attend) const {
    const auto& [items, num_items, num_rows, first_head, num_heads] = cluster;
    Partition kv = partition(cluster);
    for (int kv_head = first_head; kv_head < first_head + num_heads; ++kv_head, kv = kv.next_head()) {
      auto tile = make_tile();
      for_rows(items, num_items, kv_head, [&](int row, int item, int token, int head) {
        const int at = position(item) + token;
        const int first_visible = work_.sliding_window ? at - work_.sliding_window + 1 : 0;
        tile.set_row(row, query(work_.query_starts[item] + token) + head * shape_.head_dim, first_visible, at + 1);
      });
      attend(tile, kv);
      for_rows(items, num_items, kv_head, [&](int row, int item, int token, int head) {
        if (work_.partials[item] < 0) {
          tile.write(row, output(work_.query_starts[item] + token) + head * shape_.head_dim);
        } else {
          const int64_t part = partial(item, token, head);
          tile.write_partial(row, call_.partial_sums + part * partial_dim_, call_.partial_norms + part * 2);
        }
      });
    }
  }

  template <class Apply>
  void for_rows(const int32_t* items, int num_items, int kv_head, Apply apply) const {
    int row = 0;
    for (int i = 0; i < num_items; ++i) {
      for (int token = 0; token < work_.num_queries[items[i]]; ++token) {
        for (int j = 0; j < group_size_; ++j) apply(row++, items[i], token, kv_head * group_size_ + j);
      }
    }
  }

  // The items' heads in tiles of 1, 2, 4 or 8 rows, as many as the registers hold at most.
  void decode_in_tiles(const int32_t* items, int num_items, int kv_head) const {
    const int num_rows = num_items * group_size_;
    for (int first = 0; first < num_rows; first += kMaxRows) {
      decode_tile<1>(items, kv_head, first, std::min(kMaxRows, num_rows - first));
    }
  }

  // Rows first_row on: those of a cluster are (item, head of the group).
  template <int kRows>
  void decode_tile(const int32_t* items, int kv_head, int first_row, int num_rows) const {
    if constexpr (kRows < kMaxRows) {
      if (num_rows > kRows) return decode_tile<2 * kRows>(items, kv_head, first_row, num_rows);
    }
    int row_items[kRows], heads[kRows];
    const Element* queries[kRows];
    for (int row = 0; row < num_rows; ++row) {
      row_items[row] = items[(first_row + row) / group_size_];
      heads[row] = kv_head * group_size_ + (first_row + row) % group_size_;
      queries[row] = query(work_.query_starts[row_items[row]]) + heads[row] * shape_.head_dim;
    }
    DecodeTile<kRows> tile(queries, num_rows, shape_);
    tile.attend(partition(items[0], kv_head, position(items[0])));
    for (int row = 0; row < num_rows; ++row) {
      const int item = row_items[row];
      if (work_.partials[item] < 0) {
        tile.write(row, output(work_.query_starts[item]) + heads[row] * shape_.head_dim);
      } else {
        const int64_t part = partial(item, 0, heads[row]);
        tile.write_partial(row, call_.partial_sums + part * partial_dim_, call_.partial_norms + part * 2);
      }
    }
  }

  void prefill(int item, int kv_head) const {
    thread_local Scratch scratch;
    const int64_t row = work_.query_starts[item];
    const int64_t head = static_cast<int64_t>(kv_head) * group_size_ * shape_.head_dim;
    const QueryTile tile{position(item), work_.num_queries[item], group_size_, work_.sliding_window};
    PrefillTile prefill(tile, shape_, scratch);
    prefill.start(query(row) + head, call_.query_stride);
    prefill.attend(partition(item, kv_head, position(item)));
    prefill.write(output(row) + head, output_stride());
  }

  // Adds up a tile's partitions in their order, for one head of each of its query tokens.
  void merge(int index, int head) const {
    const int first_item = work_.merge_items[index];
    for (int token = 0; token < work_.num_queries[first_item]; ++token) {
      float maximum = kHidden;
      for (int i = 0; i < work_.merge_counts[index]; ++i) {
        maximum = std::max(maximum, call_.partial_norms[2 * partial(first_item + i, token, head)]);
      }
      alignas(kAlignment) float sums[kMaxHeadDim] = {};
      float norm = 0.0f;
      for (int i = 0; i < work_.merge_counts[index]; ++i) {
        const int64_t part = partial(first_item + i, token, head);
        const float weight = std::exp2(call_.partial_norms[2 * part] - maximum);
        norm += weight * call_.partial_norms[2 * part + 1];
        const float* part_sums = call_.partial_sums + part * partial_dim_;
        for (int d = 0; d < partial_dim_; ++d) sums[d] += weight * part_sums[d];
      }
      store_scaled(sums, 1.0f / norm, output(work_.query_starts[first_item] + token) + head * shape_.head_dim,
                   shape_.head_dim);
    }
  }

  Partition partition(const Cluster& cluster) const {
    return partition(cluster.items[0], cluster.first_head, position(cluster.items[0]));
  }

  Partition partition(int item, int kv_head, int first_position) const {
    const int window_start = work_.sliding_window ? first_position - work_.sliding_window + 1 : 0;
    return {blocks(call_.keys, item, kv_head), blocks(call_.values, item, kv_head),
            std::max(work_.kv_starts[item], window_start), work_.kv_ends[item]};
  }

  HeadBlocks blocks(const void* pool, int item, int kv_head) const {
    const HeadLayout layout{shape_.block_size, shape_.head_dim};
    const int64_t table = static_cast<int64_t>(work_.seqs[item]) * work_.table_stride;
    return {static_cast<const char*>(pool) + kv_head * layout.bytes(), work_.block_tables + table,
            shape_.num_kv_heads * layout.bytes(), layout};
  }

  // Of the item's first query token.
  int position(int item) const {
    const int seq = work_.seqs[item];
    return work_.context_lens[seq] - work_.cu_seqlens_q[seq + 1] + work_.query_starts[item];
  }

  int64_t partial(int item, int token, int head) const {
    return static_cast<int64_t>(work_.partials[item] + token) * shape_.num_heads + head;
  }

  int64_t output_stride() const { return static_cast<int64_t>(shape_.num_heads) * shape_.head_dim; }
  const Element* query(int64_t row) const {
    return static_cast<const Element*>(call_.query) + row * call_.query_stride;
  }
  Element* output(int64_t row) const { return static_cast<Element*>(call_.output) + row * output_stride(); }

  const Shape& shape_;
  const Work& work_;
  const Call& call_;
  int group_size_;
  int partial_dim_;  // floats between two rows of partial sums
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_attend(const pagoda::Shape* shape, const pagoda::Work* work, const pagoda::Call* call) {
  pagoda::Attention(*shape, *work, *call).run();
}

#pragma GCC visibility pop
