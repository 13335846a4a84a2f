// A matrix that is packed in panels of columns, times some rows: in float32, or in bfloat16 where there are units for it.
//
// Both have the same face: what a row becomes before it is multiplied (Prepared), how columns are packed, and multiply().
// Few rows are multiplied with many columns at once, for that needs more streams of weights and more independent sums;
// more rows with fewer columns, each of which is then read once for all of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dots.h"
#include "matmul.h"
#include "simd.h"

namespace pagoda {

constexpr int kBytesAhead = 4096;  // from the weights in use to those that are prefetched, in each panel

// Finished sums, `stride` apart, of rows first_row to end_row, and of num_columns columns (whole vectors).
struct SumBlock {
  const float* sums;
  int64_t stride;
  int first_row, end_row;
  int first_column, num_columns;
};

class FloatPanels {
 public:
  using Prepared = float;
  static constexpr int kColumns = kPanel;
  static constexpr int kGroup = 1;      // inputs of a column that lie together
  static constexpr int kDepthStep = 1;  // the depth is a multiple of it
  static constexpr int kMaxUnit = 4;    // panels of one thread's unit of work: they share a tile of rows in the L1 cache

  // Prepared rows are row_stride apart; a panel has `depth` rows of kColumns.
  FloatPanels(const Element* weight, int64_t depth, int64_t row_stride)
      : weight_(weight), depth_(depth), row_stride_(row_stride) {}

  // Calls write(SumBlock) for each tile of rows and columns: tiles of as equal heights as can be.
  template <class Write>
  void multiply(const float* rows, int num_rows, int panel, int end_panel, const Write& write) const {
    const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int begin = num_rows * tile / num_tiles, end = num_rows * (tile + 1) / num_tiles;
      multiply_rows<kTileRows>(rows + begin * row_stride_, begin, end, panel, end_panel, write);
    }
  }

 private:
  static constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  template <int kRows, class Write>
  void multiply_rows(const float* rows, int row, int end_row, int panel, int end_panel, const Write& write) const {
    if constexpr (kRows > 1) {
      if (end_row - row < kRows) return multiply_rows<kRows - 1>(rows, row, end_row, panel, end_panel, write);
    }
    multiply_panels<kRows, panels_at_once(kRows)>(rows, row, panel, end_panel, write);
  }

  template <int kRows, int kPanels, class Write>
  void multiply_panels(const float* rows, int row, int panel, int end_panel, const Write& write) const {
    for (; panel + kPanels <= end_panel; panel += kPanels) {
      ProductTile<kRows, kPanels> tile = {};
      tile.template multiply<kBytesAhead>(rows, row_stride_, weight_ + panel * depth_ * kPanel, depth_ * kPanel, depth_);
      alignas(kAlignment) float sums[kRows][kPanels * kPanel];
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kPanels; ++i) store_pair(&sums[r][i * kPanel], to_order<Element>(tile.sums[r][i]));
      }
      write(SumBlock{sums[0], kPanels * kPanel, row, row + kRows, panel * kPanel, kPanels * kPanel});
    }
    if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(rows, row, panel, end_panel, write);
  }

  const Element* weight_;
  int64_t depth_, row_stride_;
};

class DotPanels {
 public:
  using Prepared = BFloat16;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kGroup = 2;
  static constexpr int kDepthStep = 2 * kTilePairs;
  static constexpr int kMaxUnit = 8;

  DotPanels(const void* weight, int64_t depth, int64_t row_stride)
      : weight_(static_cast<const BFloat16*>(weight)), depth_(depth), row_stride_(row_stride) {}

  // As above. A whole number of tiles of rows can be read.
  template <class Write>
  void multiply(const BFloat16* rows, int num_rows, int panel, int end_panel, const Write& write) const {
    const Job<Write> job{rows, num_rows, write};
    if constexpr (kHasTiles) {
      DotProduct<1, 1, Steps::kWhole, Columns>::set_up(num_rows);
      if (num_rows <= kTileHeight) return multiply_rows<1, 4>(job, panel, end_panel);
      return multiply_rows<2, 2>(job, panel, end_panel);
    }
    if (num_rows <= 4) return multiply_rows<1, 4>(job, panel, end_panel);
    if (num_rows <= 8) return multiply_rows<1, 2>(job, panel, end_panel);
    multiply_rows<1, 1>(job, panel, end_panel);
  }

 private:
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
    void prefetch(int pair, int i) const {
      if (!is_read_first) return;
      const BFloat16* ahead = at(pair, i) + kBytesAhead / sizeof(BFloat16);
      if (ahead >= first + (i + 1) * panel_stride) ahead += (num_panels - 1) * panel_stride;  // of the panels after these
      for (int line = 0; line < kTilePairs; ++line) prefetch_far(ahead + line * stride);
    }
  };

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
