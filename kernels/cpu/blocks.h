// How a block holds keys and values (kv_format.py says it in Python), and where a sequence's lie.
#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace pagoda {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int kMaxHeadDim = 256;

// Dimensions of a key that lie together, token beside token: what unpacks into whole vectors of one dimension each.
constexpr int kKeyGroup = std::is_same_v<KV, BFloat16> ? 2 : 1;
// Whether each token's elements are to be multiplied by a scale, and by kUnit, for what load() leaves out.
constexpr bool kIsScaled = sizeof(KV) == 1;
constexpr float kUnit = std::is_same_v<KV, Float8> ? 256.0f : 1.0f;
constexpr float kLargest = std::is_same_v<KV, Float8> ? 448.0f : 127.0f;  // of scaled elements

// One KV head's part of a block: elements, then scales. Keys: [head_dim / kKeyGroup, block_size, kKeyGroup]; values:
// [block_size, head_dim]; scales: [block_size].
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

  int block_size() const { return layout_.block_size; }
  int offset(int token) const { return token & (layout_.block_size - 1); }

  const KV* block(int token) const {
    return reinterpret_cast<const KV*>(first_ + table_[token >> block_bits_] * block_stride_);
  }

  // Of values; the rest of the block's follow.
  const KV* row(int token) const { return block(token) + offset(token) * layout_.head_dim; }

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
};

// kLanes tokens in two dimensions, d and d + 1; columns: those of d.
inline FloatPair load_key_pair(const KV* columns, int block_size) {
  if constexpr (kKeyGroup == 2) {
    return load_pair(columns);
  } else {
    return {load(columns), load(columns + block_size)};
  }
}

}  // namespace pagoda
