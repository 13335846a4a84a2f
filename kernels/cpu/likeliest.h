// The most likely token of a row of logits, and whether the row is finite, while the logits pass by.
#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace pagoda {

// token_id: of several equal logits, the lowest.
struct Choice {
  float logit;
  int32_t token_id;
  bool is_finite;

  // Of two parts of a row, this one's ids are the lower ones.
  void meet(const Choice& other) {
    if (other.logit > logit) {
      logit = other.logit;
      token_id = other.token_id;
    }
    is_finite &= other.is_finite;
  }
};

class Likeliest {
 public:
  // The logits of `count` tokens from first_id on, kLanes at most. Ids come in their order.
  void take(Floats logits, int32_t first_id, int count) {
    for (int lane = count; lane < kLanes; ++lane) logits[lane] = kNone;
    const auto is_higher = logits > highest_;
    highest_ = is_higher ? logits : highest_;
    ids_ = is_higher ? lanes() + first_id : ids_;
    zeros_ += logits * 0.0f;  // NaN from the first that is not finite
  }

  Choice choice() const {
    Choice found{highest_[0], ids_[0], sum(zeros_) == 0.0f};
    for (int lane = 1; lane < kLanes; ++lane) {
      if (highest_[lane] > found.logit || (highest_[lane] == found.logit && ids_[lane] < found.token_id)) {
        found.logit = highest_[lane];
        found.token_id = ids_[lane];
      }
    }
    return found;
  }

 private:
  using Ids = VectorOf<int32_t>::type;
  static constexpr float kNone = std::numeric_limits<float>::lowest();  // finite: it breaks no row

  static Ids lanes() {
    Ids ids;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] = lane;
    return ids;
  }

  Floats highest_ = broadcast(kNone), zeros_ = {};
  Ids ids_ = {};
};

}  // namespace pagoda
