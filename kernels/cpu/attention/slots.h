// Writing one token's key or value into its slot.
#pragma once

#include <algorithm>
#include <cstring>

#include "../base/rows.h"
#include "blocks.h"

namespace pagoda {

// row: [head_dim], to elements [head_dim]; returns their scale. What is not finite makes the scale so.
inline float quantize(const float* row, KV* elements, int head_dim) {
  Floats largest = {}, nothing = {};
  for_vectors(head_dim, [&](int d, int count) {
    const Floats x = load_some(row + d, count);
    largest = max(x < 0.0f ? -x : x, largest);
    nothing += x * 0.0f;
  });
  const float scale = pagoda::largest(largest) / kLargest + sum(nothing);
  const Floats divisor = broadcast(std::max(scale, std::numeric_limits<float>::min()));
  for_vectors(head_dim, [&](int d, int count) {
    const Floats x = load_some(row + d, count) / divisor;
    store_some(elements + d, max(-max(-x, broadcast(-kLargest)), broadcast(-kLargest)), count);
  });
  return scale;
}

// Elements of `row`, [head_dim]; where they are scaled, the scale goes to its place in head_block.
inline void to_elements(const float* row, KV* elements, HeadLayout layout, char* head_block, int offset) {
  if constexpr (kIsScaled) {
    const float scale = quantize(row, elements, layout.head_dim);
    std::memcpy(head_block + layout.elements() + offset * sizeof scale, &scale, sizeof scale);
  } else {
    for_vectors(layout.head_dim, [&](int d, int count) { store_some(elements + d, load_some(row + d, count), count); });
  }
}

// row: [head_dim]; head_block: the head's part of the block; offset: the slot in it.
inline void write_key(const float* row, HeadLayout layout, char* head_block, int offset) {
  KV elements[kMaxHeadDim];
  to_elements(row, elements, layout, head_block, offset);
  KV* to = reinterpret_cast<KV*>(head_block) + offset * kKeyGroup;
  for (int d = 0; d < layout.head_dim; d += kKeyGroup) {
    std::memcpy(to + d * layout.block_size, elements + d, kKeyGroup * sizeof(KV));
  }
}

// As write_key. Only the slot's own bytes are written: another thread may be writing the token beside it.
inline void write_value(const float* row, HeadLayout layout, char* head_block, int offset) {
  KV elements[kMaxHeadDim];
  to_elements(row, elements, layout, head_block, offset);
  KV* to = reinterpret_cast<KV*>(head_block) + (offset & -kValueGroup) * layout.head_dim + offset % kValueGroup;
  if constexpr (kValueGroup == 1) {
    std::memcpy(to, elements, layout.head_dim * sizeof(KV));
  } else {
    for (int d = 0; d < layout.head_dim; ++d) to[d * kValueGroup] = elements[d];
  }
}

}  // namespace pagoda
