// Attention of one token over one partition of its KV, for the query heads that share a KV head, and for as many
// sequences as share the partition.
//
// Memory-bound: each element of keys and values is read once, while the blocks that come next are prefetched. Keys are
// scored for a chunk of tokens, a vector of tokens at a time, for that is how they lie in a block; the chunk's weights
// follow; then its values are added. All sums are float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "../base/elements.h"
#include "../base/rows.h"
#include "attention.h"
#include "blocks.h"
#include "lines_ahead.h"
#include "soft_cap.h"
#include "softmax.h"

namespace pagoda {

constexpr int kMaxRows = kLanes / 2;  // their accumulators fill the registers

template <int kRows>
class DecodeTile {
 public:
  // queries: [num_rows], each [head_dim]; rows past num_rows (at most kRows) are zeros that nobody reads.
  DecodeTile(const Element* const* queries, int num_rows, const Shape& shape)
      : head_dim_(shape.head_dim), padded_dim_((head_dim_ + kPair - 1) / kPair * kPair), soft_cap_(shape.soft_cap) {
    const float factor = shape.scale * kLog2E;
    for (int row = 0; row < kRows; ++row) {
      std::fill(query_[row], query_[row] + padded_dim_, 0.0f);
      std::fill(sums_[row], sums_[row] + padded_dim_, 0.0f);
      if (row >= num_rows) continue;
      for_vectors(head_dim_, [&](int d, int count) {
        store_some(query_[row] + d, load_some(queries[row] + d, count) * factor, count);
      });
    }
  }

  void attend(const Partition& kv) {
    for (int chunk = kv.begin & -kv.keys.block_size(); chunk < kv.end; chunk += kSpan) {
      const int first = std::max(chunk, kv.begin), last = std::min(chunk + kSpan, kv.end);
      score(kv, chunk, last);
      weigh(first - chunk, last - chunk);
      if constexpr (kIsScaled) scale_weights(kv.values, chunk, last);
      add_values<kPairs>(kv, {chunk, first, last, 0});
    }
  }

  // The attention output of a row over the partition alone.
  void write(int row, Element* output) const {
    store_scaled(sums_[row], 1.0f / states_[row].norm, output, head_dim_);
  }

  // What a merge needs of a row. sums: head_dim rounded up to pairs; norm: [2].
  void write_partial(int row, float* sums, float* norm) const {
    std::memcpy(sums, sums_[row], padded_dim_ * sizeof(float));
    norm[0] = states_[row].maximum;
    norm[1] = states_[row].norm;
  }

 private:
  static constexpr int kPairs = kLanes / kRows / 2;  // of dimensions summed at once: two accumulators per row and pair

  // Values of tokens first to last are added to the sums from dimension d on.
  struct Strip {
    int chunk, first, last, d;
  };

  // Scores of the chunk's tokens up to the end of the last block: scores_[row][token].
  void score(const Partition& kv, int chunk, int last) {
    const int block_size = kv.keys.block_size();
    for (int token = chunk; token < last; token += block_size) {
      const auto after = [&](int num_blocks) {
        const int next = token + num_blocks * block_size;
        return next < last ? kv.keys.block(next) : kv.values.block(std::min(chunk + next - last, last - 1));
      };
      const Ahead ahead{after(Ahead::kSoon), after(Ahead::kLater)};
      for (int i = 0; i < block_size; i += kLanes) {
        score_tokens(kv.keys, token + i, token - chunk + i, ahead + i * kKeyGroup);
      }
    }
  }

  // Those of a vector of tokens, from `token` on.
  void score_tokens(const HeadBlocks& keys, int token, int column, Ahead ahead) {
    const int block_size = keys.block_size();
    const KV* columns = keys.columns(token);
    FloatPair products[kRows] = {};
    for (int d = 0; d < head_dim_; d += 2, columns += 2 * block_size) {
      for (int i = 0; i < 2; i += kKeyGroup) ahead.prefetch((d + i) * block_size);
      const FloatPair key = load_key_pair(columns, block_size);
      for (int row = 0; row < kRows; ++row) {
        products[row].first += key.first * query_[row][d];
        products[row].second += key.second * query_[row][d + 1];
      }
    }
    const Floats factors = keys.factors(token);
    for (int row = 0; row < kRows; ++row) {
      store(scores_[row] + column, (products[row].first + products[row].second) * factors);
    }
  }

  // Turns the scores of columns first to last into weights, and notes by how much what was summed before shrinks.
  void weigh(int first, int last) {
    const int columns = (last + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < kRows; ++row) {
      float* scores = scores_[row];
      if constexpr (kHasSoftCap) soft_cap_.apply(scores, columns, 1.0f);
      std::fill(scores, scores + first, kHidden);
      std::fill(scores + last, scores + columns, kHidden);
      decay_[row] = states_[row].weigh(scores, columns);
    }
  }

  // Weights times the scales of the values that they are for; those of hidden tokens are never read.
  void scale_weights(const HeadBlocks& values, int chunk, int last) {
    for (int token = chunk; token < last; token += kLanes) {
      const Floats factors = values.factors(token);
      for (int row = 0; row < kRows; ++row) {
        float* weights = scores_[row] + token - chunk;
        store(weights, load(weights) * factors);
      }
    }
  }

  // sums += weights * values, kWidth pairs of dimensions at a time as long as there are so many, then half as many.
  template <int kWidth>
  void add_values(const Partition& kv, Strip strip) {
    for (; strip.d + kWidth * kPair <= head_dim_; strip.d += kWidth * kPair) {
      add_strip<kWidth>(kv, strip, load_values);
    }
    if constexpr (kWidth > 1) {
      add_values<kWidth / 2>(kv, strip);
    } else if (strip.d < head_dim_) {
      const int count = head_dim_ - strip.d;
      add_strip<1>(kv, strip, [=](const KV* values) { return load_values_first(values, count); });
    }
  }

  template <int kWidth, class LoadValues>
  void add_strip(const Partition& kv, Strip strip, LoadValues load_some_values) {
    FloatPair sums[kRows][kWidth];
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) {
        const FloatPair x = load_pair(sums_[row] + strip.d + i * kPair);
        sums[row][i] = x * decay_[row];
      }
    }
    const int block_size = kv.values.block_size(), step = kValueGroup * head_dim_;
    for (int token = strip.first & -kValueGroup; token < strip.last;) {
      const int block_end = std::min(strip.last, (token & -block_size) + block_size);
      const auto after = [&](int num_blocks) {
        const int next = token + num_blocks * block_size;
        if (next < strip.last) return kv.values.row(next);
        if (next < kv.end) return kv.keys.block(next);
        return kv.keys.next_head().block(std::min(kv.begin + next - kv.end, kv.end - 1));
      };
      const KV* values = kv.values.row(token) + strip.d * kValueGroup;
      Ahead ahead = Ahead{after(Ahead::kSoon), after(Ahead::kLater)} + strip.d * kValueGroup;
      for (; token < block_end; token += kValueGroup, values += step, ahead = ahead + step) {
        for (int i = 0; i < kWidth * kPair * kValueGroup; i += kLine) ahead.prefetch(i);
        const bool is_edge = token < strip.first || token + kValueGroup > strip.last;
        const float* weights = scores_[0] + token - strip.chunk;
        for (int i = 0; i < kWidth; ++i) {
          ValuePairs x = load_some_values(values + i * kPair * kValueGroup);
          if (is_edge) x = hide_tokens(x, token, strip.first, strip.last);
          for (int row = 0; row < kRows; ++row) {
            for (int j = 0; j < kValueGroup; ++j) {
              sums[row][i].first += x.tokens[j].first * weights[row * kSpan + j];
              sums[row][i].second += x.tokens[j].second * weights[row * kSpan + j];
            }
          }
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) store_pair(sums_[row] + strip.d + i * kPair, sums[row][i]);
    }
  }

  int head_dim_, padded_dim_;
  SoftCap soft_cap_;
  alignas(kAlignment) float query_[kRows][kMaxHeadDim];
  alignas(kAlignment) float sums_[kRows][kMaxHeadDim];
  alignas(kAlignment) float scores_[kRows][kSpan];
  RowState states_[kRows];
  float decay_[kRows];
};

}  // namespace pagoda
