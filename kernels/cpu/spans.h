// A span of a sequence's KV, all bfloat16, as tiles of tokens: where they lie, and what to prefetch while some are in use.
#pragma once

#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "simd.h"

namespace pagoda {

constexpr int kTokenTile = 16;  // tokens; head_dim is a multiple of it, too
constexpr int kSpanTiles = kSpan / kTokenTile;
constexpr int kLine = kAlignment / sizeof(BFloat16);  // elements of a line of the cache

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

// Prefetches what is read of a partition by some KV heads one after the other, some way ahead of where it is used, in
// about the same order: keys of a span's tiles, their values, those of the next span.
class LinesAhead {
 public:
  LinesAhead(const Partition& kv, int num_kv_heads, int head_dim)
      : kv_(kv), num_heads_left_(num_kv_heads), tile_lines_(head_dim / 2) {
    next_head();
    advance(kTilesAhead * tile_lines_);
  }

  // num_lines: a multiple of kStep.
  void advance(int num_lines) {
    for (; num_lines > 0 && next_; num_lines -= kStep) {
      for (int i = 0; i < kStep; ++i) prefetch_far(next_ + i * stride_);
      next_ += kStep * stride_;
      line_ += kStep;
      if (line_ == tile_lines_) next_tile();
    }
  }

 private:
  static constexpr int kStep = kTokenTile / 2;  // lines
  static constexpr int kTilesAhead = 6;

  void next_tile() {
    token_ += kTokenTile;
    if (token_ < std::min(span_end_, kv_.end)) return find();
    if (is_key_) {
      is_key_ = false;
      token_ = first_token();
      return find();
    }
    next_span();
  }

  void next_head() {
    span_end_ = kv_.begin / kSpan * kSpan;
    num_heads_left_--;
    next_span();
  }

  void next_span() {
    if (span_end_ >= kv_.end) {
      next_ = nullptr;
      if (num_heads_left_ == 0) return;
      kv_ = kv_.next_head();
      return next_head();
    }
    span_end_ += kSpan;
    token_ = first_token();
    is_key_ = true;
    find();
  }

  int first_token() const { return std::max(span_end_ - kSpan, kv_.begin & -kTokenTile); }

  void find() {
    line_ = 0;
    next_ = pairs(is_key_ ? kv_.keys.columns(token_) : kv_.values.row(token_));
    stride_ = is_key_ ? 2 * kv_.keys.block_size() : kLine;
  }

  Partition kv_;
  int num_heads_left_;  // after this one
  const int tile_lines_;
  int span_end_, token_, line_;
  bool is_key_;
  int64_t stride_ = 0;
  const BFloat16* next_ = nullptr;
};

}  // namespace pagoda
