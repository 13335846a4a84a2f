// Attention of bfloat16 rows over one partition of their KV by the products of dots.h. A row is one query head of one
// token: of a prompt, of a decode, or of several decodes that share the partition.
//
// KV of bfloat16 is multiplied where it lies, keys in pairs of dimensions, values in pairs of tokens; such of 8 bits is
// unpacked (scaled_span.h). It is walked in spans whose borders are multiples of kSpan from the sequence's first token,
// and what a row sees of a span is summed in the same steps whoever else sees some of it. Weights are rounded to
// bfloat16; their norm is the sum of what they become.
#pragma once

#include <algorithm>
#include <cmath>

#include "../base/dots.h"
#include "../base/rows.h"
#include "../base/scratch.h"
#include "attention.h"
#include "blocks.h"
#include "lines_ahead.h"
#include "scaled_span.h"
#include "soft_cap.h"
#include "spans.h"
#include "visible_row.h"

namespace pagoda {

// The right side of scores: tiles of tokens side by side.
struct KeyColumns {
  const BFloat16* tiles[kTileSums];
  LinesAhead* ahead;
  int64_t stride;
  static constexpr bool is_passing = false;

  const BFloat16* at(int pair, int i) const { return tiles[i] + pair * stride; }
  void prefetch(int, int) const {
    if (ahead) ahead->advance(kTilePairs * kAlignment);
  }
};

// The right side of sums: tiles of tokens one after the other, from some dimension on.
struct ValueColumns {
  const BFloat16* const* tiles;
  LinesAhead* ahead;
  int64_t stride;
  int dimension, last_pair;
  static constexpr bool is_passing = false;

  const BFloat16* at(int pair, int i) const { return tiles[2 * pair / kTokenTile] + 2 * (dimension + i * kTileColumns); }
  // And into the L1 cache what is read two tiles of tokens later, for its lines lie apart.
  void prefetch(int pair, int i) const {
    if (!ahead) return;
    ahead->advance(kTokenTile / 2 * kAlignment);
    const BFloat16* soon = at(std::min(pair + kTokenTile, last_pair), i);
    for (int line = 0; line < kTokenTile / 2; ++line) pagoda::prefetch(soon + line * stride);
  }
};

class DotTile {
 public:
  DotTile(int num_rows, const Shape& shape, Scratch& scratch)
      : num_rows_(num_rows),
        height_(std::min(num_rows, kHeight)),
        head_dim_(shape.head_dim),
        factor_(shape.scale * kLog2E),
        soft_cap_(shape.soft_cap) {
    const int padded_rows = (num_rows + height_ - 1) / height_ * height_;
    const int num_unpacked = kIsScaled ? ScaledSpan::num_floats(head_dim_) : 0;
    float* memory =
        scratch.floats(padded_rows * (head_dim_ * 3 / 2 + 8) + kHeight * kSpan * 3 / 2 + num_unpacked);
    const auto take = [&memory](int count) {
      float* taken = memory;
      memory += count;
      return taken;
    };
    scaled_ = ScaledSpan(take(num_unpacked), head_dim_);
    scores_ = take(kHeight * kSpan);
    weights_ = reinterpret_cast<BFloat16*>(take(kHeight * kSpan / 2));
    sums_ = take(padded_rows * head_dim_);
    query_ = reinterpret_cast<BFloat16*>(take(padded_rows * head_dim_ / 2));
    rows_ = reinterpret_cast<VisibleRow*>(take(padded_rows * sizeof(VisibleRow) / sizeof(float)));
    std::fill(sums_, sums_ + padded_rows * head_dim_, 0.0f);
  }

  // query: [head_dim]. The row sees tokens first_visible to visible_end.
  void set_row(int row, const Element* query, int first_visible, int visible_end) {
    std::memcpy(query_ + row * head_dim_, query, head_dim_ * sizeof *query);
    rows_[row] = {RowState{}, first_visible, visible_end};
  }

  void attend(const Partition& kv, LinesAhead& ahead) {
    Scores::set_up(num_rows_);
    for (int start = kv.begin / kSpan * kSpan; start < kv.end; start += kSpan) {
      const SpanPart part{start, std::max(start, kv.begin), std::min(start + kSpan, kv.end)};
      find(kv, part);
      LinesAhead* lines_ahead = &ahead;
      for (int row = 0; row < num_rows_; row += height_) {
        const SpanPart seen = seen_by(rows_ + row, end_row(row) - row, part);
        if (seen.first >= seen.last) continue;
        score(row, seen, kIsScaled ? 2 * kTokenTile : 2 * kv.keys.block_size(), lines_ahead);
        weigh(row, seen, lines_ahead);
        if (lines_ahead) tiles_.hide_values(part, head_dim_);
        add_values<kTileSums>(row, seen, 0, lines_ahead);
        lines_ahead = nullptr;  // the other rows find in the cache what was read for these
      }
    }
  }

  // See LinesAhead.
  static float share_of_reading(int num_rows, int head_dim) {
    const float bytes = 2.0f * head_dim * sizeof(BFloat16), share = float{sizeof(KV)} / sizeof(BFloat16);
    return share * bytes / (bytes + kWorkPerWeight * std::min(num_rows, kHeight));
  }

  // The attention output of a row over the partition alone.
  void write(int row, Element* output) const { rows_[row].write(sums_ + row * head_dim_, output, head_dim_); }

  // What a merge needs of a row. sums: [head_dim]; norm: [2].
  void write_partial(int row, float* sums, float* norm) const {
    rows_[row].write_partial(sums_ + row * head_dim_, sums, norm, head_dim_);
  }

 private:
  // Rows that take a span in turn. Without tiles more: each turn reads all of it, which the L1 cache does not hold
  // beside scores and sums.
  static constexpr int kHeight = kHasTiles ? kTileHeight : 2 * kTileHeight;
  // Bytes that are read in the time that one weight takes.
  static constexpr int kWorkPerWeight = 16;

  using Scores = DotProduct<1, kTileSums, Steps::kWholeAndHalf, KeyColumns>;

  // The rows of a tile of them.
  int end_row(int row) const { return std::min(row + height_, num_rows_); }

  void find(const Partition& kv, SpanPart part) {
    if constexpr (kIsScaled) {
      scaled_.unpack(kv, part, tiles_);
    } else {
      tiles_.find(kv, part);
    }
  }

  // scores_[row][column of the span], unscaled; those of hidden tokens are anything.
  void score(int row, SpanPart seen, int64_t key_stride, LinesAhead* ahead) {
    const LeftRows left{query_ + row * head_dim_, head_dim_, end_row(row) - row};
    for (int tile = seen.first_tile() & -kTileSums; tile < seen.end_tile(); tile += kTileSums) {
      KeyColumns columns{{}, ahead, key_stride};
      for (int i = 0; i < kTileSums; ++i) {
        columns.tiles[i] = tiles_.keys[std::clamp(tile + i, seen.first_tile(), seen.end_tile() - 1)];
      }
      const SumRows sums{scores_ + tile * kTokenTile, kSpan, true};
      Scores(left, columns, sums).run(head_dim_ / 2);
    }
  }

  // weights_[row][column], and what was summed before shrinks accordingly.
  void weigh(int row, SpanPart seen, LinesAhead* ahead) {
    for (int i = row; i < end_row(row); ++i) {
      const int at = (i - row) * kSpan;
      const float decay = weigh_row(rows_[i], scores_ + at, weights_ + at, seen);
      if (ahead) ahead->advance(kWorkPerWeight * (seen.end_tile() - seen.first_tile()) * kTokenTile);
      float* sums = sums_ + i * head_dim_;
      if (decay != 1.0f) for_vectors(head_dim_, [=](int d, int) { store(sums + d, load(sums + d) * decay); });
    }
  }

  float weigh_row(VisibleRow& row, float* scores, BFloat16* weights, SpanPart seen) {
    if constexpr (kIsScaled) {
      scaled_.scale_scores(scores, seen);
      return row.weigh(scores, seen, factor_, soft_cap_, weights, scaled_.round());
    } else {
      return row.weigh(scores, seen, factor_, soft_cap_, weights);
    }
  }

  // sums_ += weights * values, kColumns tiles of dimensions at a time as long as there are so many, then half as many.
  template <int kColumns>
  void add_values(int row, SpanPart seen, int dimension, LinesAhead* ahead) {
    const int first = seen.first_tile(), num_pairs = (seen.end_tile() - first) * kTokenTile / 2;
    const LeftRows left{weights_ + first * kTokenTile, kSpan, end_row(row) - row};
    for (; dimension + kColumns * kTileColumns <= head_dim_; dimension += kColumns * kTileColumns) {
      const ValueColumns columns{tiles_.values + first, ahead, 2 * head_dim_, dimension, num_pairs - 1};
      const SumRows sums{sums_ + row * head_dim_ + dimension, head_dim_, false};
      DotProduct<1, kColumns, Steps::kHalf, ValueColumns>(left, columns, sums).run(num_pairs);
    }
    if constexpr (kColumns > 1) add_values<kColumns / 2>(row, seen, dimension, ahead);
  }

  const int num_rows_, height_, head_dim_;
  const float factor_;  // of scores, to base 2
  const SoftCap soft_cap_;
  float *scores_, *sums_;
  BFloat16 *weights_, *query_;
  VisibleRow* rows_;
  SpanTiles tiles_;
  ScaledSpan scaled_;
};

}  // namespace pagoda
