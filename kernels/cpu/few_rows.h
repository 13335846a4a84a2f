// Attention of few rows over one partition of their KV, all bfloat16: what DotTile computes, bit by bit, by vectors.
//
// Memory-bound, so what counts is in which order KV is asked for: one block after the other, line by line, each with one
// line of a later block. Tiles take sixteen lines at once and wait for all of them.
#pragma once

#include <algorithm>

#include "attention.h"
#include "blocks.h"
#include "lines_ahead.h"
#include "pair_sums.h"
#include "rows.h"
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

  void attend(const Partition& kv) {
    for (int start = kv.begin / kSpan * kSpan; start < kv.end; start += kSpan) {
      const SpanPart part{start, std::max(start, kv.begin), std::min(start + kSpan, kv.end)};
      const SpanPart seen = seen_by(rows_, num_rows_, part);
      if (seen.first >= seen.last) continue;
      tiles_.find(kv, seen);
      score(kv, seen);
      for (int row = 0; row < num_rows_; ++row) {
        decay_[row] = rows_[row].weigh(scores_[row], seen, factor_, soft_cap_, weights_[row]);
      }
      tiles_.hide_values(seen, head_dim_);
      add_values(kv, seen);
    }
  }

  void write(int row, Element* output) const { rows_[row].write(sums_[row], output, head_dim_); }

  void write_partial(int row, float* sums, float* norm) const {
    rows_[row].write_partial(sums_[row], sums, norm, head_dim_);
  }

 private:
  static constexpr int kWidest = sums_at_once(kRows, 8);  // vectors of dimensions
  static constexpr int kWords = 2 * kLanes;  // elements of a vector of pairs

  // Lines of the tiles that are read some tiles after `tile`, of keys or of values.
  Ahead ahead(const Partition& kv, SpanPart seen, int tile, bool is_key) const {
    const auto after = [&](int num_tiles) {
      int token = seen.token(tile + num_tiles);
      if (is_key && token < seen.last) return kv.keys.row(token);
      if (is_key) token = seen.token(seen.first_tile()) + token - seen.token(seen.end_tile());
      if (token < seen.last) return kv.values.row(token);
      if (token < kv.end) return kv.keys.row(token);
      return kv.keys.next_head().row(std::min(kv.begin + token - kv.end, kv.end - 1));
    };
    return {after(Ahead::kSoon), after(Ahead::kLater)};
  }

  // scores_[row][column of the span], unscaled.
  void score(const Partition& kv, SpanPart seen) {
    const int num_pairs = head_dim_ / 2, stride = 2 * kv.keys.block_size();
    for (int tile = seen.first_tile(); tile < seen.end_tile(); ++tile) {
      const Ahead lines = ahead(kv, seen, tile, true);
      const BFloat16* keys = tiles_.keys[tile];
      PairSum sums[kRows][kTokenTile / kLanes];
      for (int step = 0; step < num_pairs; step += kTilePairs) {
        for (int pair = step; pair < std::min(step + kTilePairs, num_pairs); ++pair, keys += stride) {
          lines.prefetch(pair * kLine);
          for (int i = 0; i < kTokenTile / kLanes; ++i) {
            const Words words = load_words(keys + i * kWords);
            for (int row = 0; row < kRows; ++row) sums[row][i].add(PairSum::left(query_[row] + 2 * pair), words);
          }
        }
        for (auto& row : sums) {
          for (PairSum& sum : row) sum.end_step();
        }
      }
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kTokenTile / kLanes; ++i) {
          store(scores_[row] + tile * kTokenTile + i * kLanes, sums[row][i].total);
        }
      }
    }
  }

  // sums_ += weights_ * values, after what was summed before has shrunk.
  void add_values(const Partition& kv, SpanPart seen) {
    for (int row = 0; row < num_rows_; ++row) {
      float* const sums = sums_[row];
      const float decay = decay_[row];
      if (decay != 1.0f) for_vectors(head_dim_, [=](int d, int) { store(sums + d, load(sums + d) * decay); });
    }
    for (int tile = seen.first_tile(); tile < seen.end_tile(); ++tile) {
      add_strips<kWidest>(tile, ahead(kv, seen, tile, false), 0);
    }
  }

  // Of one tile, kWidth vectors of dimensions at a time as long as there are so many, then half as many.
  template <int kWidth>
  void add_strips(int tile, const Ahead& lines, int dimension) {
    for (; dimension + kWidth * kLanes <= head_dim_; dimension += kWidth * kLanes) {
      add_strip<kWidth>(tile, lines + 2 * dimension, dimension);
    }
    if constexpr (kWidth > 1) add_strips<kWidth / 2>(tile, lines, dimension);
  }

  template <int kWidth>
  void add_strip(int tile, Ahead lines, int dimension) {
    PairSum sums[kRows][kWidth];
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) sums[row][i].resume(sums_[row] + dimension + i * kLanes);
    }
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
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) sums[row][i].end_in(sums_[row] + dimension + i * kLanes);
    }
  }

  const int num_rows_, head_dim_;
  const float factor_;  // of scores, to base 2
  const SoftCap soft_cap_;
  alignas(kAlignment) PairSum::Stored query_[kRows][kMaxHeadDim], weights_[kRows][kSpan];
  alignas(kAlignment) float sums_[kRows][kMaxHeadDim], scores_[kRows][kSpan];
  VisibleRow rows_[kRows];
  float decay_[kRows] = {};
  SpanTiles tiles_;
};

}  // namespace pagoda
