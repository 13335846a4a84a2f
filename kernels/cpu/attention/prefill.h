// Attention of a tile of query tokens over all the KV that they see, for the query heads that share a KV head.
//
// Compute-bound: keys and values are unpacked once per tile into float32 panels, and two matrix products with an
// online softmax between them do the rest. KV is walked in spans whose borders are multiples of kSpan from the
// sequence's first token, so a row's sums do not depend on which other rows share its tile.
#pragma once

#include <algorithm>
#include <cmath>

#include "../base/elements.h"
#include "../base/matmul.h"
#include "../base/rows.h"
#include "../base/scratch.h"
#include "attention.h"
#include "blocks.h"
#include "soft_cap.h"
#include "softmax.h"

namespace pagoda {

// Query tokens `first_position` to `first_position + num_tokens - 1`; rows are (token, head of the group).
struct QueryTile {
  int first_position;
  int num_tokens;
  int group_size;
  int sliding_window;

  int num_rows() const { return num_tokens * group_size; }
  int position(int row) const { return first_position + row / group_size; }
  int first_visible(int row) const { return sliding_window ? std::max(0, position(row) - sliding_window + 1) : 0; }
};

class PrefillTile {
 public:
  PrefillTile(const QueryTile& tile, const Shape& shape, Scratch& scratch)
      : tile_(tile),
        head_dim_(shape.head_dim),
        num_rows_((tile.num_rows() + kTileRows - 1) / kTileRows * kTileRows),
        value_dim_((head_dim_ + kPanel - 1) / kPanel * kPanel),
        factor_(shape.scale * kLog2E),
        soft_cap_(shape.soft_cap) {
    float* memory = scratch.floats(num_rows_ * (head_dim_ + value_dim_ + kSpan + 3) + 2 * kSpan * value_dim_);
    const auto take = [&memory](int count) {
      float* taken = memory;
      memory += count;
      return taken;
    };
    keys_ = take(kSpan * value_dim_);
    values_ = take(kSpan * value_dim_);
    sums_ = take(num_rows_ * value_dim_);
    scores_ = take(num_rows_ * kSpan);
    query_ = take(num_rows_ * head_dim_);
    maxima_ = take(num_rows_);
    norms_ = take(num_rows_);
    decay_ = take(num_rows_);
  }

  // query: [num_tokens] rows query_stride apart, each [group_size, head_dim].
  void start(const Element* query, int64_t query_stride) {
    std::fill(sums_, sums_ + num_rows_ * value_dim_, 0.0f);
    std::fill(maxima_, maxima_ + num_rows_, kHidden);
    std::fill(norms_, norms_ + num_rows_, 0.0f);
    const int width = tile_.group_size * head_dim_;
    for (int token = 0; token < tile_.num_tokens; ++token) {
      float* row = query_ + token * width;
      for (int i = 0; i < width; i += kLanes) {
        const int count = std::min(kLanes, width - i);
        store_first(row + i, load_first(query + token * query_stride + i, count) * factor_, count);
      }
    }
    std::fill(query_ + tile_.num_rows() * head_dim_, query_ + num_rows_ * head_dim_, 0.0f);
  }

  void attend(const Partition& kv) {
    for (int span = kv.begin / kSpan * kSpan; span < kv.end; span += kSpan) {
      const int first = std::max(span, kv.begin), last = std::min(span + kSpan, kv.end);
      // Causality: rows before this one see nothing of the span.
      const int row = std::max(0, span - tile_.first_position) * tile_.group_size / kTileRows * kTileRows;
      unpack_keys(kv.keys, span, first, last);
      unpack_values(kv.values, span, first, last);
      score(row, last - span);
      for (int i = row; i < tile_.num_rows(); ++i) weigh(i, span, first, last);
      add_values(row, last - span);
    }
  }

  // output: [num_tokens] rows output_stride apart, each [group_size, head_dim].
  void write(Element* output, int64_t output_stride) const {
    for (int row = 0; row < tile_.num_rows(); ++row) {
      Element* to = output + row / tile_.group_size * output_stride + row % tile_.group_size * head_dim_;
      store_scaled(sums_ + row * value_dim_, 1.0f / norms_[row], to, head_dim_);
    }
  }

 private:
  // keys_: panels [head_dim][kPanel tokens], zeros where nothing is visible.
  void unpack_keys(const HeadBlocks& keys, int span, int first, int last) {
    for (int token = span; token < last; token += kLanes) {
      const int column = token - span;
      float* panel = keys_ + column / kPanel * kPanel * head_dim_ + column % kPanel;
      const KV* columns = keys.columns(token);
      const Floats factors = keys.factors(token);
      const bool is_visible = first <= token && token + kLanes <= last;
      for (int d = 0; d < head_dim_; d += 2, columns += 2 * keys.block_size()) {
        FloatPair x = load_key_pair(columns, keys.block_size());
        if constexpr (kIsScaled) x = {x.first * factors, x.second * factors};
        if (!is_visible) x = {hide(x.first, first - token, last - token), hide(x.second, first - token, last - token)};
        store(panel + d * kPanel, x.first);
        store(panel + (d + 1) * kPanel, x.second);
      }
    }
    const int written = (last - span + kLanes - 1) / kLanes * kLanes;
    if (written % kPanel) zero_half_panel(keys_ + written / kPanel * kPanel * head_dim_);
  }

  // Zeros but for lanes first to last.
  static Floats hide(Floats x, int first, int last) {
    alignas(kAlignment) float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) {
      if (i < first || i >= last) lanes[i] = 0.0f;
    }
    return load(lanes);
  }

  void zero_half_panel(float* panel) {
    for (int d = 0; d < head_dim_; ++d) store(panel + d * kPanel + kLanes, Floats{});
  }

  // values_: panels [kSpan tokens][kPanel dimensions], zeros where nothing is visible; whole groups of tokens.
  void unpack_values(const HeadBlocks& values, int span, int first, int last) {
    for (int token = span; token < last; token += kValueGroup) {
      const bool is_edge = token < first || token + kValueGroup > last;
      for (int d = 0; d < value_dim_; d += kPanel) {
        ValuePairs x = {};
        if (token + kValueGroup > first) {
          const KV* row = values.row(token) + d * kValueGroup;
          x = d + kPanel <= head_dim_ ? load_values(row) : load_values_first(row, head_dim_ - d);
        }
        if (is_edge) x = hide_tokens(x, token, first, last);
        float* to = values_ + d * kSpan + (token - span) * kPanel;
        for (int i = 0; i < kValueGroup; ++i) {
          if constexpr (kIsScaled) {
            if (!is_edge) x.tokens[i] = x.tokens[i] * values.factor(token);
          }
          store_pair(to + i * kPanel, x.tokens[i]);
        }
      }
    }
  }

  void score(int first_row, int columns) {
    for (int column = 0; column < columns; column += kPanel) {
      for (int row = first_row; row < num_rows_; row += kTileRows) {
        ProductTile<kTileRows> tile = {};
        tile.multiply(query_ + row * head_dim_, head_dim_, keys_ + column * head_dim_, 0, head_dim_);
        for (int i = 0; i < kTileRows; ++i) store_pair(scores_ + (row + i) * kSpan + column, tile.sums[i][0]);
      }
    }
  }

  // Turns a row's scores into weights, those of hidden tokens into zeros.
  void weigh(int row, int span, int first, int last) {
    float* scores = scores_ + row * kSpan;
    const int columns = (last - span + kLanes - 1) / kLanes * kLanes;
    const int visible_end = std::clamp(tile_.position(row) + 1 - span, 0, last - span);
    const int visible_start = std::clamp(std::max(first, tile_.first_visible(row)) - span, 0, visible_end);
    if constexpr (kHasSoftCap) soft_cap_.apply(scores, columns, 1.0f);
    std::fill(scores, scores + visible_start, kHidden);
    std::fill(scores + visible_end, scores + columns, kHidden);
    RowState state{maxima_[row], norms_[row]};
    decay_[row] = state.weigh(scores, columns);
    maxima_[row] = state.maximum;
    norms_[row] = state.norm;
  }

  void add_values(int first_row, int tokens) {
    for (int d = 0; d < value_dim_; d += kPanel) {
      for (int row = first_row; row < num_rows_; row += kTileRows) {
        ProductTile<kTileRows> tile;
        for (int i = 0; i < kTileRows; ++i) {
          const FloatPair x = load_pair(sums_ + (row + i) * value_dim_ + d);
          tile.sums[i][0] = x * decay_[row + i];
        }
        tile.multiply(scores_ + row * kSpan, kSpan, values_ + d * kSpan, 0, tokens);
        for (int i = 0; i < kTileRows; ++i) store_pair(sums_ + (row + i) * value_dim_ + d, tile.sums[i][0]);
      }
    }
  }

  QueryTile tile_;
  int head_dim_;
  int num_rows_;   // rounded up to tiles; the rows beyond are never read
  int value_dim_;  // head_dim rounded up to panels
  float factor_;   // of scores, to base 2
  SoftCap soft_cap_;
  float *keys_, *values_, *sums_, *scores_, *query_, *maxima_, *norms_, *decay_;
};

}  // namespace pagoda
