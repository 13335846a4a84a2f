// The inner loop of products of bfloat16 by bfloat16, on CPUs that have units for it: by tiles (AMX), or by dot
// products of pairs (AVX512-BF16). Few rows are multiplied by vectors instead, to the same sums: see pair_sums.h.
//
// Each sum is made in the order of the depth, in the same steps whatever the shape of the product around it: a row
// depends on no other row, and not on how many there are.
#pragma once

#include <utility>

#include "tiles.h"

namespace pagoda {

#if defined(__AMX_BF16__) || defined(PAGODA_TILES)
constexpr bool kHasTiles = true, kHasDots = true;
#elif defined(__AVX512BF16__) || defined(PAGODA_BF16_DOTS)
constexpr bool kHasTiles = false, kHasDots = true;
#else
constexpr bool kHasTiles = false, kHasDots = false;
#endif

// The left side: rows of the depth, `stride` elements apart. With tiles, whole tiles of the height that was set up are
// read, and their sums written.
struct LeftRows {
  const BFloat16* first;
  int64_t stride;
  int count;
};

// Where sums go: rows `stride` apart. They are added to what is there, unless is_new.
struct SumRows {
  float* first;
  int64_t stride;
  bool is_new;
};

// In which steps a depth is taken: of kTilePairs, with a rest of half of them or without; or of half of them. A tile's
// sums over a step are made before they are added to those of the steps before.
enum class Steps { kWhole, kWholeAndHalf, kHalf };

// sums += left * right, over the depth from 0 to num_pairs, for kRowTiles * kTileHeight rows at most and kColumns *
// kTileColumns columns. right.at(pair, i): the elements of pairs `pair` on, in columns i * kTileColumns on, pairs
// right.stride elements apart; right.prefetch(pair, i) is called once for each of these tiles.
// Right::is_passing says whether other data are to stay in the L1 cache rather than these.
template <int kRowTiles, int kColumns, Steps kSteps, class Right>
class DotProduct {
  static_assert(kRowTiles * kColumns <= kTileSums);

 public:
  // Before any product on this thread, for rows of these steps.
  static void set_up(int num_rows) {
    if constexpr (kHasTiles) {
      Tiles::set_up(std::min(num_rows, kTileHeight), kSteps == Steps::kWhole ? kTilePairs : kTilePairs / 2);
    }
  }

  DotProduct(LeftRows left, const Right& right, SumRows sums) : left_(left), right_(right), sums_(sums) {}

  void run(int num_pairs) const {
    if constexpr (kHasTiles) {
      run_tiles(num_pairs, std::make_integer_sequence<int, kRowTiles * kColumns>{});
    } else {
      run_rows<kRowsAtOnce>(0, num_pairs);
    }
  }

 private:
  template <int... i>
  void run_tiles(int num_pairs, std::integer_sequence<int, i...> tiles) const {
    if (sums_.is_new) {
      (Tiles::clear_sums<i>(), ...);
    } else {
      (Tiles::load_sums<i>(sums_at(i), sums_.stride), ...);
    }
    int pair = 0;
    for (; pair + kStepPairs <= num_pairs; pair += kStepPairs) add_step<kSteps == Steps::kHalf>(pair, tiles);
    if (kSteps == Steps::kWholeAndHalf && pair < num_pairs) add_step<true>(pair, tiles);
    (Tiles::store_sums<i>(sums_at(i), sums_.stride), ...);
  }

  float* sums_at(int i) const {
    return sums_.first + i / kColumns * kTileHeight * sums_.stride + i % kColumns * kTileColumns;
  }

  template <bool is_half, int... i>
  void add_step(int pair, std::integer_sequence<int, i...>) const {
    (add_tile<is_half, i>(pair), ...);
  }

  // Of whole steps there are two left and two right tiles; else the second ones are for half steps.
  template <bool is_half, int i>
  void add_tile(int pair) const {
    constexpr int kRow = i / kColumns, kColumn = i % kColumns;
    constexpr int kLeft = kSteps == Steps::kWhole ? kRow % 2 : is_half;
    constexpr int kRight = kSteps == Steps::kWhole ? kColumn % 2 : is_half;
    if constexpr (kRow == 0) right_.prefetch(pair, kColumn);
    if constexpr (kColumn == 0) {
      Tiles::load_left<kLeft>(left_.first + kRow * kTileHeight * left_.stride + 2 * pair, left_.stride);
    }
    constexpr bool is_there = kRow > 0 && kColumns <= (kSteps == Steps::kWhole ? 2 : 1);
    if constexpr (!is_there) Tiles::load_right<kRight, Right::is_passing>(right_.at(pair, kColumn), right_.stride);
    Tiles::multiply<i, kLeft, kRight>();
  }

  static constexpr int kStepPairs = kSteps == Steps::kHalf ? kTilePairs / 2 : kTilePairs;

  // Without tiles: some rows at a time, their sums in registers.
  static constexpr int kVectors = kTileColumns / kLanes;
  static constexpr int kRowsAtOnce = kTileSums * 4 / kColumns;

  template <int kRows>
  void run_rows(int row, int num_pairs) const {
    for (; row + kRows <= left_.count; row += kRows) {
      if (row == 0) {
        add_rows<kRows, true>(row, num_pairs);
      } else {
        add_rows<kRows, false>(row, num_pairs);
      }
    }
    if constexpr (kRows > 1) run_rows<kRows / 2>(row, num_pairs);
  }

  // A function of its own, for what is around it would take its registers. The first rows prefetch: while that is
  // called, their sums are in memory.
  template <int kRows, bool is_first>
  __attribute__((noinline)) void add_rows(int row, int num_pairs) const {
    float* const to = sums_.first + row * sums_.stride;
    Floats sums[kRows][kColumns * kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kColumns * kVectors; ++i) {
        sums[r][i] = sums_.is_new ? Floats{} : load(to + r * sums_.stride + i * kLanes);
      }
    }
    for (int pair = 0; pair < num_pairs; pair += kStepPairs) {
      const BFloat16* columns[kColumns];
      for (int i = 0; i < kColumns; ++i) {
        columns[i] = right_.at(pair, i);
        if constexpr (is_first) right_.prefetch(pair, i);
      }
      const BFloat16* left = left_.first + row * left_.stride + 2 * pair;
      for (int p = 0; p < std::min(kStepPairs, num_pairs - pair); ++p, left += 2) {
        add_pair<kRows>(sums, left, columns, p * right_.stride);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kColumns * kVectors; ++i) store(to + r * sums_.stride + i * kLanes, sums[r][i]);
    }
  }

  template <int kRows>
  void add_pair(Floats (&sums)[kRows][kColumns * kVectors], const BFloat16* left, const BFloat16* const* columns,
                int64_t offset) const {
    Words right[kColumns * kVectors];
    for (int i = 0; i < kColumns * kVectors; ++i) {
      right[i] = load_words(columns[i / kVectors] + offset + i % kVectors * 2 * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Words x = broadcast_words(left + r * left_.stride);
      for (int i = 0; i < kColumns * kVectors; ++i) sums[r][i] = add_dot(sums[r][i], x, right[i]);
    }
  }

  const LeftRows left_;
  const Right& right_;
  const SumRows sums_;
};

}  // namespace pagoda
