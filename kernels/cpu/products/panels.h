// A matrix that is packed in panels of columns, times some rows: in float32 here, in bfloat16 in dot_panels.h.
//
// Both have the same face: what a row becomes before it is multiplied (Prepared), how columns are packed, and
// multiply(). Few rows are multiplied with many columns at once, for that needs more streams of weights and more
// independent sums; more rows with fewer columns, each of which is then read once for all of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../base/elements.h"
#include "../base/matmul.h"

namespace pagoda {

// From the weights in use to those that are prefetched, in each panel.
constexpr int kBytesAhead = kHasTiles ? 4096 : 6144;

// Finished sums, `stride` apart, of rows first_row to end_row, and of num_columns columns (whole vectors).
struct SumBlock {
  const float* sums;
  int64_t stride;
  int first_row, end_row;
  int first_column, num_columns;
};

struct PanelRange {
  int begin, end;
};

// All panels of a matrix, `unit` at a time.
struct PanelUnits {
  int num_panels, unit;

  int count() const { return (num_panels + unit - 1) / unit; }
  // None, past the last.
  PanelRange at(int64_t i) const {
    const int64_t begin = std::min<int64_t>(i * unit, num_panels);
    return {static_cast<int>(begin), static_cast<int>(std::min<int64_t>(begin + unit, num_panels))};
  }
};

class FloatPanels {
 public:
  using Prepared = float;
  static constexpr int kColumns = kPanel;
  static constexpr int kGroup = 1;      // inputs of a column that lie together
  static constexpr int kDepthStep = 1;  // the depth is a multiple of it
  static constexpr int kMaxUnit = 4;    // panels of one thread's unit of work: they share a tile of rows in the L1 cache
  static constexpr int kMaxUnitBytes = 512 << 10;  // likewise: they stay in the L2 cache for all tiles of rows

  // Prepared rows are row_stride apart; a panel has `depth` rows of kColumns.
  FloatPanels(const Element* weight, int64_t depth, int64_t row_stride)
      : weight_(weight), depth_(depth), row_stride_(row_stride) {}

  // Calls write(SumBlock) for each tile of rows and columns: tiles of as equal heights as can be. next: the panels that
  // this thread is likely to go on with, which only those in bfloat16 make use of.
  template <class Write>
  void multiply(const float* rows, int num_rows, PanelRange panels, PanelRange, const Write& write) const {
    const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int begin = num_rows * tile / num_tiles, end = num_rows * (tile + 1) / num_tiles;
      multiply_rows<kTileRows>(rows + begin * row_stride_, begin, end, panels, write);
    }
  }

 private:
  static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  template <int kRows, class Write>
  void multiply_rows(const float* rows, int row, int end_row, PanelRange panels, const Write& write) const {
    if constexpr (kRows > 1) {
      if (end_row - row < kRows) return multiply_rows<kRows - 1>(rows, row, end_row, panels, write);
    }
    multiply_panels<kRows, panels_at_once(kRows)>(rows, row, panels, write);
  }

  template <int kRows, int kPanels, class Write>
  void multiply_panels(const float* rows, int row, PanelRange panels, const Write& write) const {
    int panel = panels.begin;
    for (; panel + kPanels <= panels.end; panel += kPanels) {
      ProductTile<kRows, kPanels> tile = {};
      tile.template multiply<kBytesAhead>(rows, row_stride_, weight_ + panel * depth_ * kPanel, depth_ * kPanel, depth_);
      alignas(kAlignment) float sums[kRows][kPanels * kPanel];
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kPanels; ++i) store_pair(&sums[r][i * kPanel], to_order<Element>(tile.sums[r][i]));
      }
      write(SumBlock{sums[0], kPanels * kPanel, row, row + kRows, panel * kPanel, kPanels * kPanel});
    }
    if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(rows, row, {panel, panels.end}, write);
  }

  const Element* weight_;
  int64_t depth_, row_stride_;
};

}  // namespace pagoda
