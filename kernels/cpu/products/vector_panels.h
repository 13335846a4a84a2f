// A matrix that is packed in panels of columns, times some rows, by vectors. See panels.h.
//
// Owns in which order rows, panels and prefetches come. Rows and columns are words of two elements or of four; what two
// words' product is, and how such products are summed, is Sum's: see pair_sums.h and quad_sums.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../base/dots.h"
#include "../base/elements.h"
#include "../base/pair_sums.h"
#include "../base/weights_ahead.h"
#include "panels.h"

namespace pagoda {

constexpr int kPanelsAtOnce = 4;                        // by vectors, at most
constexpr int kVectorRows = kHasTiles ? kFewRows : 10;  // at most, that vectors multiply without turns

// Panels one after the other, as lines of kTilePairs words, one of each column.
template <class Element>
struct PanelColumns {
  const Element* first;
  int64_t panel_stride;
  int num_panels;
  static constexpr int kPerWord = 4 / sizeof(Element);
  static constexpr int64_t stride = kPerWord * kTileColumns;  // of lines

  const Element* at(int line, int i) const { return first + i * panel_stride + line * stride; }
  // What is read `steps` of kTilePairs lines after panel i's `line`: there, or in the panels after these.
  const Element* ahead(int line, int i, int steps) const {
    const Element* ahead = at(line + steps * kTilePairs, i);
    return ahead < first + (i + 1) * panel_stride ? ahead : ahead + (num_panels - 1) * panel_stride;
  }
};

// Rows from first_row on, and who is given their sums.
template <class Element, class Write>
struct RowsJob {
  const Element* rows;
  int first_row, num_rows;
  const Write& write;
};

template <class Sum>
class VectorPanels {
 public:
  using Element = Sum::Element;
  template <class Write>
  using Job = RowsJob<Element, Write>;
  static constexpr int kColumns = kTileColumns;

  // As DotPanels.
  VectorPanels(const void* weight, int64_t depth, int64_t row_stride)
      : weight_(static_cast<const Element*>(weight)), depth_(depth), row_stride_(row_stride) {}

  const Element* panel_at(int panel) const { return weight_ + panel * depth_ * kColumns; }

  // At most kVectorRows.
  template <class Write>
  void multiply_few(const Job<Write>& job, PanelRange panels) const {
    StepsAhead ahead;
    multiply_some<1, kVectorRows>(job, panels, ahead);
  }

  // More of them; not with tiles, which do that.
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

 private:
  using Columns = PanelColumns<Element>;
  static constexpr int kPerWord = Columns::kPerWord;
  static constexpr int kVectors = kColumns / kLanes;
  static constexpr int kTurnRows = 6;  // at most; their sums and those panels fill the registers
  static constexpr int kLeastTurnRows = (2 * kTurnRows + 1) / 3;  // of some more than one turn holds, shared out evenly
  static_assert(kHasTiles || kVectorRows > kTurnRows);
  static constexpr int kStepsAhead = kHasTiles ? 2 : 4;  // from the weights in use to those that are prefetched

  // What is prefetched while few rows are multiplied: line by line what comes some steps later, there or in the panels
  // after these.
  struct StepsAhead {
    const Element* lines[kPanelsAtOnce];

    template <int kPanels>
    void start(const Columns& columns, int line) {
      for (int i = 0; i < kPanels; ++i) lines[i] = columns.ahead(line, i, kStepsAhead);
    }
    void prefetch(int line, int i) const { prefetch_weights(lines[i] + line * Columns::stride); }
  };

  // With more rows, which take their turns over panels in the L2 cache: the panels that come next, in as many lines a
  // step as will have fetched all of them when the last turn ends.
  struct PanelsAhead {
    const Element *next, *end;
    int lines_per_step;

    template <int kPanels>
    void start(const Columns&, int) {
      for (int i = 0; i < lines_per_step && next < end; ++i, next += Columns::stride) prefetch_far(next);
    }
    void prefetch(int, int) const {}
  };

  // kLeast to kRows rows, line by line: a tile takes sixteen lines at once, and waits for all of them.
  template <int kLeast, int kRows, class Write, class Ahead>
  void multiply_some(const Job<Write>& job, PanelRange panels, Ahead& ahead) const {
    if constexpr (kRows > kLeast) {
      if (job.num_rows < kRows) return multiply_some<kLeast, kRows - 1>(job, panels, ahead);
    }
    multiply_panels<kRows, sums_at_once<Sum>(kRows * kVectors, kPanelsAtOnce)>(job, panels, ahead);
  }

  template <int kRows, int kPanels, class Write, class Ahead>
  void multiply_panels(const Job<Write>& job, PanelRange panels, Ahead& ahead) const {
    int panel = panels.begin;
    for (; panel + kPanels <= panels.end; panel += kPanels) {
      job.write.expect(job.first_row, job.first_row + kRows, panel * kColumns, kPanels * kColumns);
      Sum sums[kRows][kPanels * kVectors];
      const Columns columns{panel_at(panel), depth_ * kColumns, kPanels};
      for (int line = 0; line < depth_ / kPerWord; line += kTilePairs) {
        add_step(sums, job.rows + kPerWord * line, columns, line, ahead);
      }
      alignas(kAlignment) float totals[kRows][kPanels * kColumns];
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kPanels * kVectors; ++i) store(&totals[row][i * kLanes], sums[row][i].floats());
      }
      const int end_row = job.first_row + kRows;
      job.write(SumBlock{totals[0], kPanels * kColumns, job.first_row, end_row, panel * kColumns, kPanels * kColumns});
    }
    if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(job, {panel, panels.end}, ahead);
  }

  // rows: from `line` on.
  template <int kRows, int kSums, class Ahead>
  void add_step(Sum (&sums)[kRows][kSums], const Element* rows, const Columns& columns, int line, Ahead& ahead) const {
    constexpr int kPanels = kSums / kVectors;
    ahead.template start<kPanels>(columns, line);
    for (int l = 0; l < kTilePairs; ++l) {
      for (int i = 0; i < kPanels; ++i) {
        ahead.prefetch(l, i);
        for (int v = 0; v < kVectors; ++v) {
          const Words words = load_words(columns.at(line + l, i) + v * kPerWord * kLanes);
          for (int row = 0; row < kRows; ++row) {
            sums[row][i * kVectors + v].add(Sum::left(rows + row * row_stride_ + kPerWord * l), words);
          }
        }
      }
    }
    for (auto& row : sums) {
      for (Sum& sum : row) sum.end_step();
    }
  }

  const Element* weight_;
  int64_t depth_, row_stride_;
};

}  // namespace pagoda
