// A span of a sequence's KV of 8 bits as tiles of bfloat16. Those hold its elements exactly; scales stay apart: those
// of keys are for scores, those of values for weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "../base/elements.h"
#include "blocks.h"
#include "softmax.h"
#include "spans.h"

namespace pagoda {

class ScaledSpan {
 public:
  static constexpr int num_floats(int head_dim) { return kSpan * head_dim + 2 * kSpan; }

  ScaledSpan() = default;  // to be assigned before it is used

  // memory: num_floats() of them, aligned.
  ScaledSpan(float* memory, int head_dim)
      : head_dim_(head_dim),
        key_factors_(memory),
        value_factors_(memory + kSpan),
        keys_(reinterpret_cast<BFloat16*>(memory + 2 * kSpan)),
        values_(keys_ + kSpan * head_dim) {}

  // Lines of keys are 2 * kTokenTile elements apart.
  void unpack(const Partition& kv, SpanPart part, SpanTiles& tiles) {
    for (int tile = part.first_tile(); tile < part.end_tile(); ++tile) {
      const int token = part.token(tile);
      BFloat16* const keys = keys_ + tile * kTokenTile * head_dim_;
      BFloat16* const values = values_ + tile * kTokenTile * head_dim_;
      unpack_keys(kv.keys.columns(token), kv.keys.block_size(), keys);
      unpack_values(kv.values.row(token), values);
      for (int i = 0; i < kTokenTile; i += kLanes) {
        store(key_factors_ + tile * kTokenTile + i, kv.keys.factors(token + i));
        store(value_factors_ + tile * kTokenTile + i, kv.values.factors(token + i));
      }
      tiles.keys[tile] = keys;
      tiles.values[tile] = values;
    }
    // What is not written yet may have any scale, and has no weight.
    const int begin = part.first_tile() * kTokenTile, end = part.end_tile() * kTokenTile;
    std::fill(value_factors_ + begin, value_factors_ + (part.first - part.start), 0.0f);
    std::fill(value_factors_ + (part.last - part.start), value_factors_ + end, 0.0f);
  }

  // scores: [kSpan], of a row.
  void scale_scores(float* scores, SpanPart seen) const {
    for (int i = seen.first_tile() * kTokenTile; i < seen.end_tile() * kTokenTile; i += kLanes) {
      store(scores + i, load(scores + i) * load(key_factors_ + i));
    }
  }

  // Weights times the scales of the values that they are for, rounded; their sum is of what they are without.
  class Round {
   public:
    explicit Round(const float* factors) : factors_(factors) {}
    Round from(int column) const { return Round(factors_ + column); }

    Floats store(BFloat16* to, Floats weight, int column) const {
      const Floats factor = load(factors_ + column), rounded = rounded_up(weight * factor);
      store_rounded(to, rounded);
      return factor > 0.0f ? rounded / factor : weight;
    }

   private:
    const float* factors_;
  };
  Round round() const { return Round(value_factors_); }

 private:
  // columns: of a tile's tokens, dimension by dimension.
  void unpack_keys(const KV* columns, int block_size, BFloat16* to) const {
    for (int d = 0; d < head_dim_; d += 2, columns += 2 * block_size) {
      for (int i = 0; i < kTokenTile; i += kLanes, to += kPair) store_exact(to, columns + i, columns + block_size + i);
    }
  }

  void unpack_values(const KV* row, BFloat16* to) const {
    for (int token = 0; token < kTokenTile; token += 2, row += 2 * head_dim_) {
      for (int d = 0; d < head_dim_; d += kLanes, to += kPair) store_exact(to, row + d, row + head_dim_ + d);
    }
  }

  // Two vectors, element beside element.
  static void store_exact(BFloat16* to, const KV* even, const KV* odd) {
    const Words words = reinterpret_cast<Words>(load(even)) >> 16 | reinterpret_cast<Words>(load(odd));
    std::memcpy(to, &words, sizeof words);
  }

  int head_dim_;
  float *key_factors_, *value_factors_;
  BFloat16 *keys_, *values_;
};

}  // namespace pagoda
