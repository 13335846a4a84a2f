// The most likely token of a row of logits, and whether the row is finite, while the logits pass by.
#pragma once

#include <cstdint>
#include <limits>

#include "../base/elements.h"

namespace pagoda {

// token_id: of several equal logits, the lowest.
struct Choice {
  float logit;
  int32_t token_id;
  bool is_finite;

  // Another token of the row.
  void meet(float other, int32_t other_id) {
    if (other < logit || (other == logit && other_id > token_id)) return;
    logit = other;
    token_id = other_id;
  }
  // Another part of it.
  void meet(const Choice& other) {
    meet(other.logit, other.token_id);
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
    for (int lane = 1; lane < kLanes; ++lane) found.meet(highest_[lane], ids_[lane]);
    return found;
  }

  static constexpr float kNone = std::numeric_limits<float>::lowest();  // finite: it breaks no row

 private:
  using Ids = VectorOf<int32_t>::type;

  static Ids lanes() {
    Ids ids;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] = lane;
    return ids;
  }

  Floats highest_ = broadcast(kNone), zeros_ = {};
  Ids ids_ = {};
};

}  // namespace pagoda
