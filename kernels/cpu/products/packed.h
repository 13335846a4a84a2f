// How the weight of a `Linear` is packed, and what becomes of the sums that are made with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../base/rows.h"
#include "dot_panels.h"
#include "linear.h"
#include "panels.h"

namespace pagoda {

using Panels = std::conditional_t<kHasDots && std::is_same_v<Element, BFloat16>, DotPanels, FloatPanels>;

inline int num_panels_of(int num_outputs) { return (num_outputs + Panels::kColumns - 1) / Panels::kColumns; }

// Inputs, and zeros up to a whole step.
inline int64_t depth_of(int64_t num_inputs) {
  return (num_inputs + Panels::kDepthStep - 1) / Panels::kDepthStep * Panels::kDepthStep;
}

// Calls apply(row of the block, column, count, outputs) for vectors of `count` columns.
template <class Apply>
inline void for_outputs(const Linear& linear, const SumBlock& block, const Apply& apply) {
  const int num_columns = std::min(block.num_columns, linear.num_outputs - block.first_column);
  const auto* bias = static_cast<const Element*>(linear.bias);
  for (int row = block.first_row; row < block.end_row; ++row) {
    const float* sums = block.sums + (row - block.first_row) * block.stride;
    for_vectors(num_columns, [&](int i, int count) {
      Floats x = load(sums + i);
      if (bias) x += load_some(bias + block.first_column + i, count);
      apply(row, block.first_column + i, count, x);
    });
  }
}

}  // namespace pagoda
