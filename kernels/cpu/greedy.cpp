// The most likely token of each row of logits, and whether the row is finite, in one pass over memory.
#include <limits>

#include "simd.h"
#include "team.h"

namespace pagoda {
namespace {

using Ids = VectorOf<int32_t>::type;

struct Choice {
  int64_t token_id, is_finite;
};

// Of several equal logits, the lowest id.
Choice choose(const float* logits, int64_t vocab_size) {
  Floats best = broadcast(-std::numeric_limits<float>::infinity()), zeros = {};
  Ids found = {}, ids;
  for (int lane = 0; lane < kLanes; ++lane) ids[lane] = lane;
  int64_t i = 0;
  for (; i + kLanes <= vocab_size; i += kLanes, ids += kLanes) {
    const Floats x = load(logits + i);
    const auto is_better = x > best;
    best = is_better ? x : best;
    found = is_better ? ids : found;
    zeros += x * 0.0f;  // NaN from the first that is not finite
  }
  float highest = best[0], zero = sum(zeros);
  int64_t token_id = found[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (best[lane] > highest || (best[lane] == highest && found[lane] < token_id)) {
      highest = best[lane];
      token_id = found[lane];
    }
  }
  for (; i < vocab_size; ++i) {
    zero += logits[i] * 0.0f;
    if (logits[i] > highest) {
      highest = logits[i];
      token_id = i;
    }
  }
  return {token_id, zero == 0.0f};
}

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// logits: [num_rows, vocab_size]; choices: [2, num_rows], token ids, then whether all of the row is finite.
extern "C" void pagoda_greedy(const float* logits, int64_t* choices, int64_t num_rows, int64_t vocab_size,
                              int32_t num_threads) {
  pagoda::for_units(num_threads, num_rows, [=](int64_t row) {
    const pagoda::Choice choice = pagoda::choose(logits + row * vocab_size, vocab_size);
    choices[row] = choice.token_id;
    choices[num_rows + row] = choice.is_finite;
  });
}

#pragma GCC visibility pop
