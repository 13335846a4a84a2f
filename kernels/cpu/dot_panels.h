// A matrix that is packed in panels of columns, times some rows, in bfloat16 on CPUs with units for it. See panels.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dots.h"
#include "pair_sums.h"
#include "panels.h"
#include "simd.h"
#include "weights_ahead.h"

namespace pagoda {

class DotPanels {
 public:
  using Prepared = BFloat16;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kGroup = 2;
  static constexpr int kDepthStep = 2 * kTilePairs;
  static constexpr int kPanelsAtOnce = 4;  // by vectors, at most
  // Without tiles the L3 cache is fast enough for units of any size.
  static constexpr int kMaxUnit = kHasTiles ? 8 : kPanelsAtOnce;
  static constexpr int kMaxUnitBytes = kHasTiles ? 512 << 10 : std::numeric_limits<int>::max();

  DotPanels(const void* weight, int64_t depth, int64_t row_stride)
      : weight_(static_cast<const BFloat16*>(weight)), depth_(depth), row_stride_(row_stride) {}

  // See FloatPanels. With tiles, a whole number of tiles of rows can be read. Before vectors make sums they tell of them,
  // by write.expect(first row, end row, first column, number of columns).
  template <class Write>
  void multiply(const BFloat16* rows, int num_rows, PanelRange panels, PanelRange next, const Write& write) const {
    [[maybe_unused]] const SmallIsZero small_is_zero;
    const Job<Write> job{rows, 0, num_rows, write};
    if (num_rows <= kVectorRows) {
      StepsAhead ahead;
      multiply_some<1, kVectorRows>(job, panels, ahead);
    } else if constexpr (kHasTiles) {
      DotProduct<1, 1, Steps::kWhole, Columns>::set_up(num_rows);
      if (num_rows <= kTileHeight) return multiply_rows<1, 4>(job, panels);
      multiply_rows<2, 2>(job, panels);
    } else {
      multiply_in_turns(job, panels, next);
    }
  }

 private:
  static constexpr int kVectors = kColumns / kLanes;
  static constexpr int kTurnRows = 6;  // at most; their sums and those panels fill the registers
  static constexpr int kLeastTurnRows = (2 * kTurnRows + 1) / 3;  // of some more than one turn holds, shared out evenly
  static constexpr int kVectorRows = kHasTiles ? kFewRows : 10;  // at most, that vectors multiply without turns
  static_assert(kHasTiles || kVectorRows > kTurnRows);
  // From the weights in use to those that are prefetched.
  static constexpr int kStepsAhead = kHasTiles ? 2 : 4, kTileStepsAhead = 1;

  template <class Write>
  struct Job {
    const BFloat16* rows;  // from first_row on
    int first_row, num_rows;
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
      const BFloat16* lines = ahead(pair, i, kTileStepsAhead);
      for (int line = 0; line < kTilePairs; ++line) pagoda::prefetch(lines + line * stride);
    }
  };

  // What is prefetched while few rows are multiplied: line by line what comes some steps later, there or in the panels
  // after these.
  struct StepsAhead {
    const BFloat16* lines[kPanelsAtOnce];

    template <int kPanels>
    void start(const Columns& columns, int pair) {
      for (int i = 0; i < kPanels; ++i) lines[i] = columns.ahead(pair, i, kStepsAhead);
    }
    void prefetch(int line, int i) const { prefetch_weights(lines[i] + line * Columns::stride); }
  };

  // With more rows, which take their turns over panels in the L2 cache: the panels that come next, in as many lines a
  // step as will have fetched all of them when the last turn ends.
  struct PanelsAhead {
    const BFloat16 *next, *end;
    int lines_per_step;

    template <int kPanels>
    void start(const Columns&, int) {
      for (int i = 0; i < lines_per_step && next < end; ++i, next += Columns::stride) prefetch_far(next);
    }
    void prefetch(int, int) const {}
  };

  const BFloat16* panel_at(int panel) const { return weight_ + panel * depth_ * kColumns; }

  template <class Write>
  void multiply_in_turns(const Job<Write>& job, PanelRange panels, PanelRange next) const {
    const int num_turns = (job.num_rows + kTurnRows - 1) / kTurnRows;
    const int lines_per_step = (kTilePairs * (next.end - next.begin) + num_turns - 1) / num_turns;
    PanelsAhead ahead{panel_at(next.begin), panel_at(next.end), lines_per_step};
    for (int turn = 0; turn < num_turns; ++turn) {
      const int begin = job.num_rows * turn / num_turns, end = job.num_rows * (turn + 1) / num_turns;
      const Job<Write> some{job.rows + begin * row_stride_, begin, end - begin, job.write};
      multiply_some<kLeastTurnRows, kTurnRows>(some, panels, ahead);
    }
  }

  // kLeast to kRows rows by vectors, line by line: a tile takes sixteen lines at once, and waits for all of them.
  template <int kLeast, int kRows, class Write, class Ahead>
  void multiply_some(const Job<Write>& job, PanelRange panels, Ahead& ahead) const {
    if constexpr (kRows > kLeast) {
      if (job.num_rows < kRows) return multiply_some<kLeast, kRows - 1>(job, panels, ahead);
    }
    multiply_vectors<kRows, sums_at_once(kRows * kVectors, kPanelsAtOnce)>(job, panels, ahead);
  }

  template <int kRows, int kPanels, class Write, class Ahead>
  void multiply_vectors(const Job<Write>& job, PanelRange panels, Ahead& ahead) const {
    int panel = panels.begin;
    for (; panel + kPanels <= panels.end; panel += kPanels) {
      job.write.expect(job.first_row, job.first_row + kRows, panel * kColumns, kPanels * kColumns);
      PairSum sums[kRows][kPanels * kVectors];
      const Columns columns{panel_at(panel), depth_ * kColumns, kPanels, true};
      for (int pair = 0; pair < depth_ / 2; pair += kTilePairs) {
        add_step(sums, job.rows + 2 * pair, columns, pair, ahead);
      }
      alignas(kAlignment) float totals[kRows][kPanels * kColumns];
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kPanels * kVectors; ++i) store(&totals[row][i * kLanes], sums[row][i].total);
      }
      const int end_row = job.first_row + kRows;
      job.write(SumBlock{totals[0], kPanels * kColumns, job.first_row, end_row, panel * kColumns, kPanels * kColumns});
    }
    if constexpr (kPanels > 1) multiply_vectors<kRows, kPanels / 2>(job, {panel, panels.end}, ahead);
  }

  // rows: from `pair` on.
  template <int kRows, int kSums, class Ahead>
  void add_step(PairSum (&sums)[kRows][kSums], const BFloat16* rows, const Columns& columns, int pair,
                Ahead& ahead) const {
    constexpr int kPanels = kSums / kVectors;
    ahead.template start<kPanels>(columns, pair);
    for (int line = 0; line < kTilePairs; ++line) {
      for (int i = 0; i < kPanels; ++i) {
        ahead.prefetch(line, i);
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
    const Columns columns{panel_at(panel), depth_ * kColumns, kPanels, row == 0};
    const SumRows rows{sums[0], kPanels * kColumns, true};
    DotProduct<kRowTiles, kPanels, Steps::kWhole, Columns>(left, columns, rows).run(depth_ / 2);
    job.write(SumBlock{sums[0], kPanels * kColumns, row, end_row, panel * kColumns, kPanels * kColumns});
  }

  const BFloat16* weight_;
  int64_t depth_, row_stride_;
};

}  // namespace pagoda
