// Sums of products of pairs of bfloat16 in vectors, each made as dots.h makes those of the same CPU: bit by bit the
// same.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "dots.h"
#include "elements.h"

namespace pagoda {

// As tiles do: in steps, of even and of odd elements apart.
struct TileSum {
  using Element = BFloat16;
  using Stored = float;  // what the left side is best kept in
  using Left = FloatPair;
  static constexpr int kRegisters = 3;
  Floats total = {};
  FloatPair step = {};

  static Left left(const float* pair) { return {broadcast(pair[0]), broadcast(pair[1])}; }
  static Left left(const BFloat16* pair) { return unpack(broadcast_words(pair)); }

  void add(const Left& left, Words right) {
    const FloatPair x = unpack(right);
    step.first += x.first * left.first;
    step.second += x.second * left.second;
  }
  void end_step() {
    total += step.first + step.second;
    step = FloatPair{};
  }
  Floats floats() const { return total; }

  // Sums of one step, whose total is in memory meanwhile.
  void resume(const float*) {}
  void end_in(float* total) const { store(total, load(total) + (step.first + step.second)); }
};

// As dot products do: pair after pair.
struct DotSum {
  using Element = BFloat16;
  using Stored = BFloat16;
  using Left = Words;
  static constexpr int kRegisters = 1;
  Floats total = {};

  static Left left(const BFloat16* pair) { return broadcast_words(pair); }
  void add(Left left, Words right) { total = add_dot(total, left, right); }
  void end_step() {}
  Floats floats() const { return total; }

  void resume(const float* sums) { total = load(sums); }
  void end_in(float* sums) const { store(sums, total); }
};

using PairSum = std::conditional_t<kHasTiles, TileSum, DotSum>;

constexpr int kFewRows = kHasTiles ? 4 : 8;  // that vectors take less time for

// Vectors of sums of each of so many rows that fit into registers: a power of two, `most` at most.
template <class Sum>
constexpr int sums_at_once(int num_rows, int most) {
  constexpr int kSums = 24 / Sum::kRegisters;
  return std::clamp<int>(std::bit_floor(static_cast<unsigned>(kSums / num_rows)), 1, most);
}

}  // namespace pagoda
