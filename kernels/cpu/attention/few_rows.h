// Attention of few rows over one partition of their KV, all bfloat16: what DotTile computes, bit by bit, by vectors.
//
// Memory-bound, so what counts is in which order KV is asked for: one block after the other, line by line, each with
// one line of a later block. Tiles take sixteen lines at once and wait for all of them.
#pragma once

#include <algorithm>

#include "../base/pair_sums.h"
#include "../base/rows.h"
#include "attention.h"
#include "blocks.h"
#include "lines_ahead.h"
#include "soft_cap.h"
#include "spans.h"
#include "visible_row.h"

namespace pagoda {

// kRows: num_rows at least; what the others are is for nobody to read.
template <int kRows>
class FewRowsTile {
 public:
  FewRowsTile(int num_rows, const Shape& shape)
      : num_rows_(num_rows), head_dim_(shape.head_dim), factor_(shape.scale * kLog2E), soft_cap_(shape.soft_cap) {
    for (int row = 0; row < kRows; ++row) {
      std::fill(query_[row], query_[row] + head_dim_, PairSum::Stored{});
      std::fill(sums_[row], sums_[row] + head_dim_, 0.0f);
      if (row >= num_rows) std::fill(weights_[row], weights_[row] + kSpan, PairSum::Stored{});
    }
  }

  // See DotTile.
  void set_row(int row, const Element* query, int first_visible, int visible_end) {
    for_vectors(head_dim_, [&](int d, int) { store(query_[row] + d, load(query + d)); });
    rows_[row] = {RowState{}, first_visible, visible_end};
  }

  __attribute__((always_inline)) void attend(const Partition& kv) {
    for (int start = kv.begin / kSpan * kSpan; start < kv.end; start += kSpan) {
      const SpanPart part{start, std::max(start, kv.begin), std::min(start + kSpan, kv.end)};
      const SpanPart seen = seen_by(rows_, num_rows_, part);
      if (seen.first >= seen.last) continue;
      tiles_.find(kv, seen);
      find_places(kv, seen);
      score(seen, 2 * kv.keys.block_size());
      for (int row = 0; row < num_rows_; ++row) {
        decay_[row] = rows_[row].weigh(scores_[row], seen, factor_, soft_cap_, weights_[row]);
      }
      tiles_.hide_values(seen, head_dim_);
      add_values(seen);
    }
  }

  void write(int row, Element* output) const { rows_[row].write(sums_[row], output, head_dim_); }

  void write_partial(int row, float* sums, float* norm) const {
    rows_[row].write_partial(sums_[row], sums, norm, head_dim_);
  }

 private:
  static constexpr int kWidest = sums_at_once<PairSum>(kRows, 8);  // vectors of dimensions
  static constexpr int kWords = 2 * kLanes;  // elements of a vector of pairs
  static constexpr bool kIsTall = kRows > 4;
  // Tiles of keys side by side, for more independent sums, and of values one after the other while sums stay in
  // registers. Of tall ones there are sums enough with one, and strips of values are too narrow to be read far.
  static constexpr bool kHasRoom = !kHasTiles && !kIsTall;
  static constexpr int kKeyTiles = kHasRoom ? 2 : 1;
  static constexpr int kValueTiles = kHasRoom ? kSpanTiles : 1;

  // Calls run(), which has an inner loop and is to be inlined: for tall tiles here, else in a function of its own,
  // where all registers are free for sums.
  template <class Run>
  static void apart(const Run& run) {
    if constexpr (kIsTall) {
      run();
    } else {
      call(run);
    }
  }
  template <class Run>
  __attribute__((noinline)) static void call(const Run& run) {
    run();
  }

  // apply(row, i) for kCount sums of each row. Unrolled, for GCC keeps arrays that are walked through in memory.
  template <int kCount, class Apply>
  static void for_sums(const Apply& apply) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) apply(row, i);
    }
  }

  // Where each tile of the span lies, in the order of reading: keys, values, and of what is read then the first tiles.
  void find_places(const Partition& kv, SpanPart seen) {
    const KV** place = places_;
    const int end = seen.token(seen.end_tile());
    for (int tile = seen.first_tile(); tile < seen.end_tile(); ++tile) *place++ = kv.keys.row(seen.token(tile));
    for (int tile = seen.first_tile(); tile < seen.end_tile(); ++tile) *place++ = kv.values.row(seen.token(tile));
    for (int token = end; token < end + Ahead::kLater * kTokenTile; token += kTokenTile) {
      *place++ = token < kv.end ? kv.keys.row(token)
                                : kv.keys.next_head().row(std::min(kv.begin + token - kv.end, kv.end - 1));
    }
  }

  // Lines of the tiles that are read some tiles after this one, of keys or of values.
  Ahead ahead(SpanPart seen, int tile, bool is_key) const {
    const KV* const* place = places_ + tile - seen.first_tile() + (is_key ? 0 : seen.end_tile() - seen.first_tile());
    return {place[Ahead::kSoon], place[Ahead::kLater]};
  }

  // scores_[row][column of the span], unscaled.
  void score(SpanPart seen, int key_stride) {
    int tile = seen.first_tile();
    for (; tile + kKeyTiles <= seen.end_tile(); tile += kKeyTiles) {
      apart([=, this] { score_tiles<kKeyTiles>(seen, tile, key_stride); });
    }
    if constexpr (kKeyTiles > 1) {
      if (tile < seen.end_tile()) apart([=, this] { score_tiles<1>(seen, tile, key_stride); });
    }
  }

  template <int kTiles>
  __attribute__((always_inline)) void score_tiles(SpanPart seen, int tile, int key_stride) {
    constexpr int kVectors = kTokenTile / kLanes;
    const int num_pairs = head_dim_ / 2;
    Ahead lines[kTiles];
    const BFloat16* keys[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      lines[i] = ahead(seen, tile + i, true);
      keys[i] = tiles_.keys[tile + i];
    }
    PairSum sums[kRows][kTiles * kVectors];
    for_sums<kTiles * kVectors>([&](int row, int i) { sums[row][i] = PairSum{}; });
    for (int step = 0; step < num_pairs; step += kTilePairs) {
      for (int pair = step; pair < std::min(step + kTilePairs, num_pairs); ++pair) {
        for (int i = 0; i < kTiles; ++i) {
          lines[i].prefetch(pair * kLine);
          for (int v = 0; v < kVectors; ++v) {
            const Words words = load_words(keys[i] + v * kWords);
            for (int row = 0; row < kRows; ++row) {
              sums[row][i * kVectors + v].add(PairSum::left(query_[row] + 2 * pair), words);
            }
          }
          keys[i] += key_stride;
        }
      }
      for (auto& row : sums) {
        for (PairSum& sum : row) sum.end_step();
      }
    }
    for_sums<kTiles * kVectors>([&](int row, int i) {
      store(scores_[row] + tile * kTokenTile + i * kLanes, sums[row][i].total);
    });
  }

  // sums_ += weights_ * values, after what was summed before has shrunk.
  void add_values(SpanPart seen) {
    for (int row = 0; row < num_rows_; ++row) {
      float* const sums = sums_[row];
      const float decay = decay_[row];
      if (decay != 1.0f) for_vectors(head_dim_, [=](int d, int) { store(sums + d, load(sums + d) * decay); });
    }
    for (int tile = seen.first_tile(); tile < seen.end_tile(); tile += kValueTiles) {
      add_strips<kWidest>(seen, tile, std::min(tile + kValueTiles, seen.end_tile()), 0);
    }
  }

  // Of some tiles, kWidth vectors of dimensions at a time as long as there are so many, then half as many.
  template <int kWidth>
  void add_strips(SpanPart seen, int tile, int end_tile, int dimension) {
    for (; dimension + kWidth * kLanes <= head_dim_; dimension += kWidth * kLanes) {
      apart([=, this] { add_strip<kWidth>(seen, tile, end_tile, dimension); });
    }
    if constexpr (kWidth > 1) add_strips<kWidth / 2>(seen, tile, end_tile, dimension);
  }

  template <int kWidth>
  __attribute__((always_inline)) void add_strip(SpanPart seen, int tile, int end_tile, int dimension) {
    PairSum sums[kRows][kWidth];
    for_sums<kWidth>([&](int row, int i) { sums[row][i].resume(sums_[row] + dimension + i * kLanes); });
    for (; tile < end_tile; ++tile) {
      Ahead lines = ahead(seen, tile, false) + 2 * dimension;
      const BFloat16* values = tiles_.values[tile] + 2 * dimension;
      for (int token = tile * kTokenTile; token < (tile + 1) * kTokenTile; token += 2) {
        for (int i = 0; i < kWidth * kWords; i += kLine) lines.prefetch(i);
        for (int i = 0; i < kWidth; ++i) {
          const Words words = load_words(values + i * kWords);
          for (int row = 0; row < kRows; ++row) sums[row][i].add(PairSum::left(weights_[row] + token), words);
        }
        values += 2 * head_dim_;
        lines = lines + 2 * head_dim_;
      }
    }
    for_sums<kWidth>([&](int row, int i) { sums[row][i].end_in(sums_[row] + dimension + i * kLanes); });
  }

  const int num_rows_, head_dim_;
  const float factor_;  // of scores, to base 2
  const SoftCap soft_cap_;
  alignas(kAlignment) PairSum::Stored query_[kRows][kMaxHeadDim], weights_[kRows][kSpan];
  alignas(kAlignment) float sums_[kRows][kMaxHeadDim], scores_[kRows][kSpan];
  VisibleRow rows_[kRows];
  float decay_[kRows] = {};
  SpanTiles tiles_;
  const KV* places_[2 * kSpanTiles + Ahead::kLater];  // see find_places
};

}  // namespace pagoda
