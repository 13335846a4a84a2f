// A matrix that is packed in panels of columns, times some rows, in bfloat16 on CPUs with units for it. See panels.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dots.h"
#include "pair_sums.h"
#include "panels.h"
#include "simd.h"

namespace pagoda {

class DotPanels {
 public:
  using Prepared = BFloat16;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kGroup = 2;
  static constexpr int kDepthStep = 2 * kTilePairs;
  static constexpr int kMaxUnit = 8;

  DotPanels(const void* weight, int64_t depth, int64_t row_stride)
      : weight_(static_cast<const BFloat16*>(weight)), depth_(depth), row_stride_(row_stride) {}

  // See FloatPanels. A whole number of tiles of rows can be read.
  template <class Write>
  void multiply(const BFloat16* rows, int num_rows, int panel, int end_panel, const Write& write) const {
    const Job<Write> job{rows, num_rows, write};
    [[maybe_unused]] const SmallIsZero small_is_zero;
    if (num_rows <= kFewRows) return multiply_few<kFewRows>(job, panel, end_panel);
    if constexpr (kHasTiles) {
      DotProduct<1, 1, Steps::kWhole, Columns>::set_up(num_rows);
      if (num_rows <= kTileHeight) return multiply_rows<1, 4>(job, panel, end_panel);
      return multiply_rows<2, 2>(job, panel, end_panel);
    } else {
      multiply_rows<1, 1>(job, panel, end_panel);
    }
  }

 private:
  // From the weights in use to those that are prefetched, in steps of the depth; with few rows, which are done sooner.
  static constexpr int kStepsAhead = kHasTiles ? 1 : 2, kFewStepsAhead = 2;

  template <class Write>
  struct Job {
    const BFloat16* rows;
    int num_rows;
    const Write& write;
  };

  // The right side of a product: panels one after the other.
  struct Columns {
    const BFloat16* first;
    int64_t panel_stride;
    int num_panels;
    bool is_read_first;  // what comes next is then still to be fetched from memory
    static constexpr int64_t stride = 2 * kColumns;
    static constexpr bool is_passing = true;  // the rows stay

    const BFloat16* at(int pair, int i) const { return first + i * panel_stride + pair * stride; }
    // What is read `steps` after the lines of panel i from `pair` on: there, or in the panels after these.
    const BFloat16* ahead(int pair, int i, int steps) const {
      const BFloat16* ahead = at(pair + steps * kTilePairs, i);
      return ahead < first + (i + 1) * panel_stride ? ahead : ahead + (num_panels - 1) * panel_stride;
    }
    void prefetch(int pair, int i) const {
      if (!is_read_first) return;
      const BFloat16* lines = ahead(pair, i, kStepsAhead);
      for (int line = 0; line < kTilePairs; ++line) pagoda::prefetch(lines + line * stride);
    }
  };

  static constexpr int kVectors = kColumns / kLanes;

  // By vectors, line by line: a tile takes sixteen lines at once, and waits for all of them.
  template <int kRows, class Write>
  void multiply_few(const Job<Write>& job, int panel, int end_panel) const {
    if constexpr (kRows > 1) {
      if (job.num_rows < kRows) return multiply_few<kRows - 1>(job, panel, end_panel);
    }
    multiply_few<kRows, sums_at_once(kRows * kVectors, 4)>(job, panel, end_panel);
  }

  template <int kRows, int kPanels, class Write>
  void multiply_few(const Job<Write>& job, int panel, int end_panel) const {
    for (; panel + kPanels <= end_panel; panel += kPanels) {
      PairSum sums[kRows][kPanels * kVectors];
      const Columns columns{weight_ + panel * depth_ * kColumns, depth_ * kColumns, kPanels, true};
      for (int pair = 0; pair < depth_ / 2; pair += kTilePairs) add_step(sums, job.rows + 2 * pair, columns, pair);
      alignas(kAlignment) float totals[kRows][kPanels * kColumns];
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kPanels * kVectors; ++i) store(&totals[row][i * kLanes], sums[row][i].total);
      }
      job.write(SumBlock{totals[0], kPanels * kColumns, 0, kRows, panel * kColumns, kPanels * kColumns});
    }
    if constexpr (kPanels > 1) multiply_few<kRows, kPanels / 2>(job, panel, end_panel);
  }

  // rows: from `pair` on.
  template <int kRows, int kSums>
  void add_step(PairSum (&sums)[kRows][kSums], const BFloat16* rows, const Columns& columns, int pair) const {
    constexpr int kPanels = kSums / kVectors;
    const BFloat16* ahead[kPanels];
    for (int i = 0; i < kPanels; ++i) ahead[i] = columns.ahead(pair, i, kFewStepsAhead);
    for (int line = 0; line < kTilePairs; ++line) {
      for (int i = 0; i < kPanels; ++i) {
        prefetch(ahead[i] + line * Columns::stride);
        for (int v = 0; v < kVectors; ++v) {
          const Words words = load_words(columns.at(pair + line, i) + 2 * v * kLanes);
          for (int row = 0; row < kRows; ++row) {
            sums[row][i * kVectors + v].add(PairSum::left(rows + row * row_stride_ + 2 * line), words);
          }
        }
      }
    }
    for (auto& row : sums) {
      for (PairSum& sum : row) sum.end_step();
    }
  }

  // Some rows after the others, which stay in the L1 cache while all panels pass.
  template <int kRowTiles, int kPanels, class Write>
  void multiply_rows(const Job<Write>& job, int panel, int end_panel) const {
    int row = 0;
    for (; row + (kRowTiles - 1) * kTileHeight < job.num_rows; row += kRowTiles * kTileHeight) {
      multiply_panels<kRowTiles, kPanels>(job, row, panel, end_panel);
    }
    for (; row < job.num_rows; row += kTileHeight) multiply_panels<1, kPanels>(job, row, panel, end_panel);
  }

  template <int kRowTiles, int kPanels, class Write>
  void multiply_panels(const Job<Write>& job, int row, int panel, int end_panel) const {
    for (; panel + kPanels <= end_panel; panel += kPanels) multiply_tiles<kRowTiles, kPanels>(job, row, panel);
    if constexpr (kPanels > 1) multiply_panels<kRowTiles, kPanels / 2>(job, row, panel, end_panel);
  }

  template <int kRowTiles, int kPanels, class Write>
  void multiply_tiles(const Job<Write>& job, int row, int panel) const {
    alignas(kAlignment) float sums[kRowTiles * kTileHeight][kPanels * kColumns];
    const int end_row = std::min(row + kRowTiles * kTileHeight, job.num_rows);
    const LeftRows left{job.rows + row * row_stride_, row_stride_, end_row - row};
    const Columns columns{weight_ + panel * depth_ * kColumns, depth_ * kColumns, kPanels, row == 0};
    DotProduct<kRowTiles, kPanels, Steps::kWhole, Columns>(left, columns, {sums[0], kPanels * kColumns, true}).run(depth_ / 2);
    job.write(SumBlock{sums[0], kPanels * kColumns, row, end_row, panel * kColumns, kPanels * kColumns});
  }

  const BFloat16* weight_;
  int64_t depth_, row_stride_;
};

}  // namespace pagoda
