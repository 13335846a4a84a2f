// Prefetches KV into the L2 cache, some way ahead of where it is read.
#pragma once

#include <algorithm>

#include "../base/elements.h"
#include "blocks.h"

namespace pagoda {

// Places in blocks that are read some time after the one in use, in the order of reading: keys of a span, its values,
// those of the next span, of the next KV head. Their lines go to the L1 and to the L2 cache meanwhile.
struct Ahead {
  static constexpr int kSoon = 1, kLater = 4;  // blocks after the one in use
  const KV *soon, *later;

  Ahead operator+(int64_t distance) const { return {soon + distance, later + distance}; }
  void prefetch(int64_t element) const {
    pagoda::prefetch(soon + element);
    prefetch_far(later + element);
  }
};

// What some KV heads one after the other read of a partition, in the order of reading: keys of a span, its values,
// those of the next span.
//
// Lines are asked for as evenly as work is done: a core can wait for some ten of them at a time, and while it asks for
// none, memory idles.
class LinesAhead {
 public:
  // share_of_reading: of the bytes that advance() is told of, those that are read.
  LinesAhead(const Partition& kv, int num_kv_heads, float share_of_reading)
      : kv_(kv), num_heads_left_(num_kv_heads), share_(share_of_reading) {
    next_head();
    ask(kLead);
  }

  // num_bytes: that are read now, or could be in the time that other work takes.
  void advance(int num_bytes) { ask(num_bytes * share_); }

 private:
  static constexpr int kLead = 24 << 10;          // bytes
  static constexpr int kStep = 8 * kAlignment;  // likewise; a block's end may be overstepped

  void ask(float num_bytes) {
    due_ += num_bytes;
    for (; due_ >= kStep && next_; due_ -= kStep) {
      for (int i = 0; i < kStep; i += kAlignment) prefetch_far(next_ + i);
      next_ += kStep;
      if (next_ >= end_) next_block();
    }
  }

  void next_block() {
    token_ += kv_.keys.block_size();
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

  int first_token() const { return std::max(span_end_ - kSpan, kv_.begin & -kv_.keys.block_size()); }

  void find() {
    const HeadBlocks& blocks = is_key_ ? kv_.keys : kv_.values;
    next_ = reinterpret_cast<const char*>(blocks.block(token_));
    end_ = next_ + blocks.block_bytes();
  }

  Partition kv_;
  int num_heads_left_;  // after this one
  const float share_;
  float due_ = 0.0f;
  int span_end_, token_;
  bool is_key_;
  const char *next_ = nullptr, *end_ = nullptr;
};

}  // namespace pagoda
