// A matrix that is packed in panels of columns, times some rows, in bfloat16 on CPUs with units for it. See panels.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../base/dots.h"
#include "../base/pair_sums.h"
#include "panels.h"
#include "vector_panels.h"

namespace pagoda {

class DotPanels {
 public:
  using Prepared = BFloat16;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kGroup = 2;
  static constexpr int kDepthStep = 2 * kTilePairs;
  // Without tiles the L3 cache is fast enough for units of any size.
  static constexpr int kMaxUnit = kHasTiles ? 8 : kPanelsAtOnce;
  static constexpr int kMaxUnitBytes = kHasTiles ? 512 << 10 : std::numeric_limits<int>::max();

  DotPanels(const void* weight, int64_t depth, int64_t row_stride)
      : vectors_(weight, depth, row_stride), depth_(depth), row_stride_(row_stride) {}

  // See FloatPanels. With tiles, a whole number of tiles of rows can be read. Before vectors make sums they tell of
  // them, by write.expect(first row, end row, first column, number of columns).
  template <class Write>
  void multiply(const BFloat16* rows, int num_rows, PanelRange panels, PanelRange next, const Write& write) const {
    [[maybe_unused]] const SmallIsZero small_is_zero;
    const Job<Write> job{rows, 0, num_rows, write};
    if (num_rows <= kVectorRows) return vectors_.multiply_few(job, panels);
    if constexpr (kHasTiles) {
      DotProduct<1, 1, Steps::kWhole, Columns>::set_up(num_rows);
      if (num_rows <= kTileHeight) return multiply_rows<1, 4>(job, panels);
      multiply_rows<2, 2>(job, panels);
    } else {
      vectors_.multiply_in_turns(job, panels, next);
    }
  }

 private:
  template <class Write>
  using Job = RowsJob<BFloat16, Write>;

  // The right side of a product.
  struct Columns : PanelColumns<BFloat16> {
    bool is_read_first;  // what comes next is then still to be fetched from memory
    static constexpr bool is_passing = true;  // the rows stay
    static constexpr int kStepsAhead = 1;     // from the weights in use to those that are prefetched

    void prefetch(int pair, int i) const {
      if (!is_read_first) return;
      const BFloat16* lines = ahead(pair, i, kStepsAhead);
      for (int line = 0; line < kTilePairs; ++line) pagoda::prefetch(lines + line * stride);
    }
  };

  // Some rows after the others, which stay in the L1 cache while all panels pass.
  template <int kRowTiles, int kPanels, class Write>
  void multiply_rows(const Job<Write>& job, PanelRange panels) const {
    int row = 0;
    for (; row + (kRowTiles - 1) * kTileHeight < job.num_rows; row += kRowTiles * kTileHeight) {
      multiply_panels<kRowTiles, kPanels>(job, row, panels);
    }
    for (; row < job.num_rows; row += kTileHeight) multiply_panels<1, kPanels>(job, row, panels);
  }

  template <int kRowTiles, int kPanels, class Write>
  void multiply_panels(const Job<Write>& job, int row, PanelRange panels) const {
    int panel = panels.begin;
    for (; panel + kPanels <= panels.end; panel += kPanels) multiply_tiles<kRowTiles, kPanels>(job, row, panel);
    if constexpr (kPanels > 1) multiply_panels<kRowTiles, kPanels / 2>(job, row, {panel, panels.end});
  }

  template <int kRowTiles, int kPanels, class Write>
  void multiply_tiles(const Job<Write>& job, int row, int panel) const {
    alignas(kAlignment) float sums[kRowTiles * kTileHeight][kPanels * kColumns];
    const int end_row = std::min(row + kRowTiles * kTileHeight, job.num_rows);
    const LeftRows left{job.rows + row * row_stride_, row_stride_, end_row - row};
    const Columns columns{{vectors_.panel_at(panel), depth_ * kColumns, kPanels}, row == 0};
    const SumRows rows{sums[0], kPanels * kColumns, true};
    DotProduct<kRowTiles, kPanels, Steps::kWhole, Columns>(left, columns, rows).run(depth_ / 2);
    job.write(SumBlock{sums[0], kPanels * kColumns, row, end_row, panel * kColumns, kPanels * kColumns});
  }

  VectorPanels<PairSum> vectors_;
  int64_t depth_, row_stride_;
};

}  // namespace pagoda
