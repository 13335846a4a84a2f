// How a block holds keys and values (kv_format.py says it in Python), and where a sequence's lie.
#pragma once

#include <cstdint>
#include <limits>

#include "../base/elements.h"

namespace pagoda {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int kMaxHeadDim = 256;
constexpr int kSpan = 128;  // tokens whose scores become weights together
constexpr int kLine = kAlignment / sizeof(KV);  // elements of a line of the cache

// Dimensions of a key that lie together, token beside token, and tokens of which the values do, dimension beside
// dimension. Pairs unpack into whole vectors of one dimension or token each, and are what dot products take two of.
constexpr int kKeyGroup = std::is_same_v<KV, BFloat16> ? 2 : 1;
constexpr int kValueGroup = kKeyGroup;
// Whether each token's elements are to be multiplied by a scale, and by kUnit, for what load() leaves out.
constexpr bool kIsScaled = sizeof(KV) == 1;
constexpr float kUnit = std::is_same_v<KV, Float8> ? 256.0f : 1.0f;
constexpr float kLargest = std::is_same_v<KV, Float8> ? 448.0f : 127.0f;  // of scaled elements

// One KV head's part of a block: elements, then scales. Keys: [head_dim / kKeyGroup, block_size, kKeyGroup]; values:
// [block_size / kValueGroup, head_dim, kValueGroup]; scales: [block_size].
struct HeadLayout {
  int block_size;  // a power of two
  int head_dim;

  int64_t elements() const { return static_cast<int64_t>(block_size) * head_dim; }
  int64_t bytes() const { return elements() * sizeof(KV) + (kIsScaled ? block_size * sizeof(float) : 0); }
};

// Blocks of one sequence, seen from one KV head.
class HeadBlocks {
 public:
  // first: this head's part of block 0; block_stride: bytes.
  HeadBlocks(const char* first, const int32_t* table, int64_t block_stride, HeadLayout layout)
      : first_(first),
        table_(table),
        block_stride_(block_stride),
        block_bits_(__builtin_ctz(layout.block_size)),
        layout_(layout) {}

  // The same blocks, seen from the KV head after this one.
  HeadBlocks next_head() const {
    HeadBlocks next = *this;
    next.first_ += layout_.bytes();
    return next;
  }

  int block_size() const { return layout_.block_size; }
  int64_t block_bytes() const { return layout_.bytes(); }
  int offset(int token) const { return token & (layout_.block_size - 1); }

  const KV* block(int token) const {
    return reinterpret_cast<const KV*>(first_ + table_[token >> block_bits_] * block_stride_);
  }

  // Of values: those of the kValueGroup tokens that `token` is one of; the rest of the block's follow.
  const KV* row(int token) const { return block(token) + (offset(token) & -kValueGroup) * layout_.head_dim; }

  // Of keys: kLanes tokens (of one block, from a multiple of kLanes on) in their dimension 0; see load_key_pair.
  const KV* columns(int token) const { return block(token) + offset(token) * kKeyGroup; }

  // What loaded elements are to be multiplied by: of a token, and of kLanes tokens of one block from it on.
  float factor(int token) const { return kIsScaled ? *scales(token) * kUnit : 1.0f; }
  Floats factors(int token) const {
    if constexpr (kIsScaled) return pagoda::load(scales(token)) * kUnit;
    return broadcast(1.0f);
  }

 private:
  const float* scales(int token) const {
    return reinterpret_cast<const float*>(block(token) + layout_.elements()) + offset(token);
  }

  const char* first_;
  const int32_t* table_;
  int64_t block_stride_;
  int block_bits_;
  HeadLayout layout_;
};

// The part of a sequence's KV that is attended to.
struct Partition {
  HeadBlocks keys, values;
  int begin, end;  // visible tokens

  Partition next_head() const { return {keys.next_head(), values.next_head(), begin, end}; }
};

// kPair dimensions of the kValueGroup tokens that lie together, or the first `count`; the others are zeros.
struct ValuePairs {
  FloatPair tokens[kValueGroup];
};

// a, b: two tokens in kLanes dimensions each.
inline ValuePairs by_token(FloatPair a, FloatPair b) {
  ValuePairs x;
  x.tokens[0] = {a.first, b.first};
  x.tokens[kValueGroup - 1] = {a.second, b.second};
  return x;
}

inline ValuePairs load_values(const KV* values) {
  if constexpr (kValueGroup == 2) {
    return by_token(load_pair(values), load_pair(values + kPair));
  } else {
    return {{load_pair(values)}};
  }
}

inline ValuePairs load_values_first(const KV* values, int count) {
  if constexpr (kValueGroup == 2) {
    const int num_first = std::min(2 * count, kPair);
    return by_token(load_pair_first(values, num_first), load_pair_first(values + kPair, 2 * count - num_first));
  } else {
    return {{load_pair_first(values, count)}};
  }
}

// The same with zeros for tokens that are hidden, be they written or not; token: the first of them.
inline ValuePairs hide_tokens(ValuePairs x, int token, int first, int last) {
  for (int i = 0; i < kValueGroup; ++i) {
    if (token + i < first || token + i >= last) x.tokens[i] = FloatPair{};
  }
  return x;
}

// kLanes tokens in two dimensions, d and d + 1; columns: those of d.
inline FloatPair load_key_pair(const KV* columns, int block_size) {
  if constexpr (kKeyGroup == 2) {
    return load_pair(columns);
  } else {
    return {load(columns), load(columns + block_size)};
  }
}

}  // namespace pagoda
