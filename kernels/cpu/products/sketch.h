// A matrix in 8 bits, which tells where the highest of its outputs can be, and where it can't.
//
// A row x of inputs and a row w of the weight are each rounded to whole steps, x^ and w^. What the product of these
// misses is no more than |x| |w - w^| + |x - x^| |w^| (Cauchy and Schwarz). So products in 8 bits, with half the memory
// and half the operations of bfloat16, bound all outputs from above, and those that are below one that was made need
// not be made. Shim et al. (SVD-softmax, 2017) preview a vocabulary likewise, but to make what looks good: here nothing
// is missed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "../base/elements.h"
#include "../base/rows.h"
#include "../base/scratch.h"
#include "linear.h"
#include "quad_sums.h"
#include "vector_panels.h"

namespace pagoda {

constexpr int kSketchDepthStep = 4 * kTilePairs;

// What `pagoda_sketch` makes; `binding.py` mirrors it field by field. What outputs past the last have is 0.
struct Sketch {
  uint8_t* quads;  // [num_panels][depth / 4][kTileColumns][4]: steps from zero, and 128
  float* steps;    // [num_panels * kTileColumns]
  float* lengths;  // [num_panels], the longest |w|
  float* gaps;     // [num_panels], the longest |w - w^|
};

constexpr int sketch_panels_of(int num_outputs) { return (num_outputs + kTileColumns - 1) / kTileColumns; }

constexpr int64_t sketch_depth_of(int64_t num_inputs) {
  return (num_inputs + kSketchDepthStep - 1) / kSketchDepthStep * kSketchDepthStep;
}

// Numbers x that were rounded to whole steps. Lengths are rounded up; both are infinite where x is not finite, or
// squares of it overflow or vanish.
struct Rounded {
  float step;
  float sum;     // of steps
  float length;  // |x|
  float gap;     // |x - x^|
};

constexpr float kLongest = 1e12f, kNoBound = std::numeric_limits<float>::infinity();

// `width` elements, as whole steps of 127 at most.
template <class From>
inline Rounded round_to_steps(const From* from, int width, Int8* to) {
  constexpr float kMost = 127.0f, kUp = 1.001f;
  Floats tops = {};
  for_vectors(width, [&](int d, int count) {
    const Floats x = load_some(from + d, count);
    tops = max(max(x, -x), tops);
  });
  const float top = largest(tops), step = top / kMost, per_step = top > 0.0f ? kMost / top : 0.0f;
  Floats sums = {}, squares = {}, gaps = {};
  for_vectors(width, [&](int d, int count) {
    const Floats x = load_some(from + d, count), steps = (x * per_step + kRounder) - kRounder, gap = x - steps * step;
    store_some(to + d, steps, count);
    sums += steps;
    squares += x * x;
    gaps += gap * gap;
  });
  const float length = kUp * std::sqrt(sum(squares)), gap = kUp * std::sqrt(sum(gaps));
  const bool is_zero = top == 0.0f && length == 0.0f, is_known = 1.0f / kLongest < length && length < kLongest;
  if (!is_zero && !is_known) return {step, 0.0f, kNoBound, kNoBound};
  return {step, sum(sums), length, gap};
}

// Some rows, in 8 bits, and what their outputs can be at most: in each panel of the sketch.
class SketchedRows {
 public:
  SketchedRows(const Sketch& sketch, const Linear& linear, int num_rows, Scratch& scratch)
      : sketch_(sketch),
        num_inputs_(linear.num_inputs),
        num_rows_(num_rows),
        num_panels_(sketch_panels_of(linear.num_outputs)),
        depth_(sketch_depth_of(linear.num_inputs)),
        row_stride_(depth_ + kAlignment),
        rounded_(num_rows),
        tops_(scratch.floats(num_rows * (num_panels_ + row_stride_ / sizeof(float)))),
        steps_(reinterpret_cast<uint8_t*>(tops_ + int64_t{num_rows} * num_panels_)),
        panels_(sketch.quads, depth_, row_stride_) {}

  template <class From>
  void round(int row, const From* from) {
    Int8* const to = reinterpret_cast<Int8*>(steps_ + row * row_stride_);
    rounded_[row] = round_to_steps(from, num_inputs_, to);
    std::fill(to + num_inputs_, to + depth_, Int8{});
  }

  // Whether it is worth it. Tiles make logits of more than a few rows as fast as vectors would bound them.
  static constexpr bool serves(int num_rows) { return kHasQuads && (!kHasTiles || num_rows <= kVectorRows); }

  // Of the sketch, as much as a thread multiplies at a time.
  PanelUnits units() const { return {num_panels_, kPanelsAtOnce}; }

  // Multiplies all rows, which were rounded. next: what this thread is likely to go on with.
  void multiply(PanelRange panels, PanelRange next) const {
    if constexpr (kHasQuads) {  // else it would take seconds to compile, for nobody
      const RowsJob<uint8_t, SketchedRows> job{steps_, 0, num_rows_, *this};
      if (num_rows_ <= kVectorRows) return panels_.multiply_few(job, panels);
      if constexpr (!kHasTiles) panels_.multiply_in_turns(job, panels, next);
    }
  }

  // What outputs of a row are at most: [num_panels], of one panel each. All panels were multiplied; once for each row.
  std::span<float> bounds(int row) const {
    const Rounded& x = rounded_[row];
    float* const bounds = tops_ + int64_t{row} * num_panels_;
    for_vectors(num_panels_, [&, this](int i, int count) {
      const Floats length = load_some(sketch_.lengths + i, count), gap = load_some(sketch_.gaps + i, count);
      const Floats missed = x.length * gap + x.gap * (length + gap);
      const Floats rounding = depth_ * 0x1p-22f * x.length * length + kVanished;  // of sums in float32, and of these
      const Floats bound = load_some(bounds + i, count) * x.step + missed + rounding;
      store_some(bounds + i, bound < kNoBound ? bound : broadcast(kNoBound), count);
    });
    return {bounds, static_cast<size_t>(num_panels_)};
  }

  // For `multiply`.
  void expect(int, int, int, int) const {}
  __attribute__((noinline)) void operator()(const SumBlock& block) const {
    for (int row = block.first_row; row < block.end_row; ++row) {
      const float* sums = block.sums + (row - block.first_row) * block.stride;
      const float* steps = sketch_.steps + block.first_column;
      float* tops = tops_ + int64_t{row} * num_panels_ + block.first_column / kTileColumns;
      const float zero = 128.0f * rounded_[row].sum;
      for (int column = 0; column < block.num_columns; column += kTileColumns) {
        Floats highest = (load(sums + column) - zero) * load(steps + column);
        for (int i = column + kLanes; i < column + kTileColumns; i += kLanes) {
          highest = max((load(sums + i) - zero) * load(steps + i), highest);
        }
        *tops++ = largest(highest);
      }
    }
  }

 private:
  static constexpr float kVanished = 1e-15f;  // more than all terms that are taken for 0, being no normal numbers

  const Sketch& sketch_;
  const int num_inputs_, num_rows_, num_panels_;
  const int64_t depth_, row_stride_;
  std::vector<Rounded> rounded_;
  float* const tops_;  // [num_rows][num_panels], in steps of the row
  uint8_t* const steps_;
  const VectorPanels<QuadSum> panels_;
};

}  // namespace pagoda
