// A row of attention by dots.h, as far as it is summed up, and which tokens it sees.
#pragma once

#include <algorithm>
#include <cstring>

#include "../base/rows.h"
#include "soft_cap.h"
#include "softmax.h"
#include "spans.h"

namespace pagoda {

struct VisibleRow {
  RowState state;
  int first_visible, visible_end;

  // Turns the scores of what some row sees of a span into weights; scores of what is hidden from this one are anything.
  // scores, weights: [kSpan]. factor: of scores, to base 2. Returns by how much what was summed before shrinks.
  template <class Weight, class Round = Rounded>
  float weigh(float* scores, SpanPart seen, float factor, const SoftCap& soft_cap, Weight* weights, Round round = {}) {
    const int begin = seen.first_tile() * kTokenTile, end = seen.end_tile() * kTokenTile;
    const int last = std::clamp(std::min(visible_end, seen.last) - seen.start, begin, end);
    const int first = std::clamp(std::max(first_visible, seen.first) - seen.start, begin, last);
    if constexpr (kHasSoftCap) soft_cap.apply(scores + begin, end - begin, factor);
    std::fill(scores + begin, scores + first, kHidden);
    std::fill(scores + last, scores + end, kHidden);
    return state.weigh(scores + begin, end - begin, kHasSoftCap ? 1.0f : factor, weights + begin, round.from(begin));
  }

  // sums: [head_dim], what was summed up.
  void write(const float* sums, Element* output, int head_dim) const {
    store_scaled(sums, 1.0f / state.norm, output, head_dim);
  }

  void write_partial(const float* sums, float* to, float* norm, int head_dim) const {
    std::memcpy(to, sums, head_dim * sizeof(float));
    norm[0] = state.maximum;
    norm[1] = state.norm;
  }
};

// What of `part` some of the rows see.
inline SpanPart seen_by(const VisibleRow* rows, int num_rows, SpanPart part) {
  SpanPart seen{part.start, part.last, part.first};
  for (int i = 0; i < num_rows; ++i) {
    seen.first = std::min(seen.first, rows[i].first_visible);
    seen.last = std::max(seen.last, rows[i].visible_end);
  }
  return {part.start, std::max(seen.first, part.first), std::min(seen.last, part.last)};
}

}  // namespace pagoda
