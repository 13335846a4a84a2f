// Sums of products of pairs of bfloat16 in vectors, each made as dots.h makes those of the same CPU: bit by bit the same.
#pragma once

#include <cstring>
#include <type_traits>

#include "dots.h"
#include "simd.h"

namespace pagoda {

inline Words load_words(const BFloat16* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// The pair at `from`, in every lane.
inline Words broadcast_pair(const BFloat16* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair - Words{};
}

// As tiles do: in steps, of even and of odd elements apart.
struct TileSum {
  using Stored = float;  // what the left side is best kept in
  using Left = FloatPair;
  static constexpr int kRegisters = 3;
  Floats total = {};
  FloatPair step = {};

  static Left left(const float* pair) { return {broadcast(pair[0]), broadcast(pair[1])}; }
  static Left left(const BFloat16* pair) { return unpack(broadcast_pair(pair)); }

  void add(const Left& left, Words right) {
    const FloatPair x = unpack(right);
    step.first += x.first * left.first;
    step.second += x.second * left.second;
  }
  void end_step() {
    total += step.first + step.second;
    step = FloatPair{};
  }
};

// As dot products do: pair after pair.
struct DotSum {
  using Stored = BFloat16;
  using Left = Words;
  static constexpr int kRegisters = 1;
  Floats total = {};

  static Left left(const BFloat16* pair) { return broadcast_pair(pair); }
  void add(Left left, Words right) { total = add_dot(total, left, right); }
  void end_step() {}
};

using PairSum = std::conditional_t<kHasTiles, TileSum, DotSum>;

}  // namespace pagoda
