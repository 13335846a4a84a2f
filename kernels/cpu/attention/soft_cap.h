// A model's cap on its scores: they become cap * tanh(score / cap). Compiled in for models that have one alone.
#pragma once

#include "../base/elements.h"

namespace pagoda {

#if defined(PAGODA_SOFT_CAP)
constexpr bool kHasSoftCap = true;
#else
constexpr bool kHasSoftCap = false;
#endif

// Of scores to base 2, as the softmax takes them.
class SoftCap {
 public:
  explicit SoftCap(float cap) : cap_(cap * kLog2E), exponent_(-2.0f * kLog2E / cap_) {}

  // scores, times `factor` first; columns: a multiple of kLanes.
  void apply(float* scores, int columns, float factor) const {
    for (int i = 0; i < columns; i += kLanes) {
      const Floats x = load(scores + i) * factor;
      const Floats power = exp2((x < 0.0f ? -x : x) * exponent_);
      const Floats capped = cap_ * (1.0f - power) / (1.0f + power);
      store(scores + i, x < 0.0f ? -capped : capped);
    }
  }

 private:
  float cap_, exponent_;
};

}  // namespace pagoda
