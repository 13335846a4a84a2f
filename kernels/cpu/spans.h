// A span of a sequence's KV, all bfloat16, as tiles of tokens: where they lie.
#pragma once

#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "simd.h"

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

// KV is bfloat16 wherever this is run.
inline const BFloat16* pairs(const KV* elements) { return reinterpret_cast<const BFloat16*>(elements); }

// Where the keys and values of a span's tiles lie. Of values with hidden tokens there is a copy, with zeros for those.
class SpanTiles {
 public:
  // head_dim / 2 lines, `stride` elements apart.
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
    for (int token = 0; token < kTokenTile; token += 2) {
      const auto seen = [=](int i) { return first <= i && i < last ? 0xffffu : 0u; };
      const uint32_t mask = seen(token) | seen(token + 1) << 16;
      for (int d = 0; d < head_dim; ++d) {
        uint32_t pair;
        std::memcpy(&pair, values[tile] + token * head_dim + 2 * d, sizeof pair);
        pair &= mask;
        std::memcpy(copy + token * head_dim + 2 * d, &pair, sizeof pair);
      }
    }
    values[tile] = copy;
  }

  alignas(kAlignment) BFloat16 copies_[2][kTokenTile * kMaxHeadDim];
};

}  // namespace pagoda
