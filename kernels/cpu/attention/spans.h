// A span of a sequence's KV as tiles of tokens of bfloat16: where they lie.
#pragma once

#include <algorithm>
#include <cstring>

#include "../base/elements.h"
#include "blocks.h"

namespace pagoda {

constexpr int kTokenTile = 16;  // tokens; head_dim is a multiple of it, too
constexpr int kSpanTiles = kSpan / kTokenTile;

// Tokens first to last of the span that begins with token `start`.
struct SpanPart {
  int start, first, last;

  int first_tile() const { return (first - start) / kTokenTile; }
  int end_tile() const { return (last - start + kTokenTile - 1) / kTokenTile; }
  int token(int tile) const { return start + tile * kTokenTile; }
};

// Of KV that is bfloat16.
inline const BFloat16* pairs(const KV* elements) { return reinterpret_cast<const BFloat16*>(elements); }

// Where the keys and values of a span's tiles lie. Of values with hidden tokens there is a copy, with zeros for those.
class SpanTiles {
 public:
  // head_dim / 2 lines, some stride apart.
  const BFloat16* keys[kSpanTiles];
  const BFloat16* values[kSpanTiles];  // head_dim / 2 lines, one after the other

  void find(const Partition& kv, SpanPart part) {
    for (int tile = part.first_tile(); tile < part.end_tile(); ++tile) {
      const int token = part.token(tile);
      keys[tile] = pairs(kv.keys.columns(token));
      values[tile] = pairs(kv.values.row(token));
    }
  }

  void hide_values(SpanPart part, int head_dim) {
    hide(part.first_tile(), part, copies_[0], head_dim);
    hide(part.end_tile() - 1, part, copies_[1], head_dim);
  }

 private:
  void hide(int tile, SpanPart part, BFloat16* copy, int head_dim) {
    const int first = part.first - part.token(tile), last = part.last - part.token(tile);
    if (first <= 0 && last >= kTokenTile) return;
    const auto seen = [=](int token) { return first <= token && token < last ? 0xffffu : 0u; };
    for (int token = 0; token < kTokenTile; token += 2) {
      const int64_t line = token * head_dim;
      copy_pairs(values[tile] + line, copy + line, head_dim, seen(token) | seen(token + 1) << 16);
    }
    values[tile] = copy;
  }

  // A function of its own, for the compiler to see that nothing else is written, and to do it by vectors.
  static void copy_pairs(const BFloat16* __restrict from, BFloat16* __restrict to, int count, uint32_t mask) {
    for (int i = 0; i < count; ++i) {
      uint32_t pair;
      std::memcpy(&pair, from + 2 * i, sizeof pair);
      pair &= mask;
      std::memcpy(to + 2 * i, &pair, sizeof pair);
    }
  }

  alignas(kAlignment) BFloat16 copies_[2][kTokenTile * kMaxHeadDim];
};

}  // namespace pagoda
