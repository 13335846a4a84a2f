// The online softmax that decode and prefill share.
#pragma once

#include <cmath>

#include "../base/elements.h"
#include "blocks.h"

namespace pagoda {

// Weights as bfloat16 holds them.
struct Rounded {
  Rounded from(int) const { return *this; }

  template <class Weight>
  Floats store(Weight* to, Floats weight, int) const {
    const Floats rounded = rounded_up(weight);
    store_rounded(to, rounded);
    return rounded;
  }
};

// A row of attention as far as it is summed up: the highest score (base 2), the sum of the weights.
struct RowState {
  float maximum = kHidden;
  float norm = 0.0f;

  // Turns the next scores, hidden ones being kHidden, into weights. columns: a multiple of kLanes.
  // Returns by how much what was summed before shrinks.
  float weigh(float* scores, int columns) {
    Floats top = broadcast(maximum);
    for (int i = 0; i < columns; i += kLanes) top = max(load(scores + i), top);
    const float highest = largest(top);
    const float shift = highest == kHidden ? 0.0f : highest;  // nothing visible yet: all weights are 0
    Floats total = {};
    for (int i = 0; i < columns; i += kLanes) {
      const Floats weights = exp2(load(scores + i) - shift);
      store(scores + i, weights);
      total += weights;
    }
    const float decay = std::exp2(maximum - shift);
    norm = norm * decay + sum(total);
    maximum = highest;
    return decay;
  }

  // The same of scores times `factor`, a positive number, to weights as round.store(weights, weight, column) leaves and
  // returns them.
  template <class Weight, class Round>
  float weigh(const float* scores, int columns, float factor, Weight* weights, const Round& round) {
    Floats top = load(scores);
    for (int i = kLanes; i < columns; i += kLanes) top = max(load(scores + i), top);
    const float highest = std::max(largest(top) * factor, maximum);
    const float shift = highest == kHidden ? 0.0f : highest;
    Floats total = {};
    for (int i = 0; i < columns; i += kLanes) {
      total += round.store(weights + i, exp2_rough(load(scores + i) * factor - shift), i);
    }
    const float decay = maximum == highest ? 1.0f : exp2(broadcast(maximum - shift))[0];
    norm = norm * decay + sum(total);
    maximum = highest;
    return decay;
  }
};

}  // namespace pagoda
