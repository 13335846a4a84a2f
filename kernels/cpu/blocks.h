// Where a sequence's keys and values lie.
#pragma once

#include <cstdint>
#include <limits>

namespace pagoda {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Blocks of one sequence, seen from one KV head.
template <class Element>
struct HeadBlocks {
  const Element* first;  // this head's slots in block 0
  const int32_t* table;
  int64_t block_stride;  // elements
  int block_bits;        // log2 of block_size
  int head_dim;

  int block_size() const { return 1 << block_bits; }

  // The slot of `token`; the rest of its block follows.
  const Element* slot(int token) const {
    return first + table[token >> block_bits] * block_stride + (token & (block_size() - 1)) * head_dim;
  }
};

// The part of a sequence's KV that is attended to.
template <class Element>
struct Partition {
  HeadBlocks<Element> keys, values;
  int begin, end;  // visible tokens
};

}  // namespace pagoda
