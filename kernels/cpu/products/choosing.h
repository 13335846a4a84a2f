// The highest output of each row, and whether all of them are finite. Nobody writes the outputs down.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "../base/scratch.h"
#include "../base/team.h"
#include "likeliest.h"
#include "linear.h"
#include "packed.h"
#include "sketch.h"

namespace pagoda {

class Choosing {
 public:
  using Prepared = Panels::Prepared;

  Choosing(const Linear& linear, const LinearCall& call, const Panels& panels, PanelUnits units, int64_t row_stride)
      : linear_(linear), call_(call), panels_(panels), units_(units), row_stride_(row_stride) {}

  // rows: prepared.
  void run(const Prepared* rows, int num_rows, int64_t first_row) const {
    if (call_.sketch && SketchedRows::serves(num_rows)) {
      choose_from_bounded(rows, num_rows, first_row);
    } else {
      choose_from_all(rows, num_rows, first_row);
    }
  }

 private:
  static constexpr int kMaxParts = 64;  // of the outputs, each of one thread
  static constexpr int kFewRounded = 8;

  // Outputs are looked at while they pass.
  struct Look {
    const Choosing& choosing;
    Likeliest* likeliest;

    void expect(int, int, int, int) const {}
    void operator()(const SumBlock& block) const { choosing.look_at(block, likeliest); }
  };

  void choose_from_all(const Prepared* rows, int num_rows, int64_t first_row) const {
    const int num_units = units_.count(), num_parts = std::min(num_units, kMaxParts);
    std::vector<Choice> choices(num_parts * num_rows);
    for_units(call_.num_threads, num_parts, [&, this](int64_t part) {
      std::vector<Likeliest> likeliest(num_rows);
      for (int64_t unit = num_units * part / num_parts; unit < num_units * (part + 1) / num_parts; ++unit) {
        panels_.multiply(rows, num_rows, units_.at(unit), units_.at(unit + 1), Look{*this, likeliest.data()});
      }
      for (int row = 0; row < num_rows; ++row) choices[part * num_rows + row] = likeliest[row].choice();
    });
    for (int row = 0; row < num_rows; ++row) {
      for (int part = 1; part < num_parts; ++part) choices[row].meet(choices[part * num_rows + row]);
      write(first_row + row, choices[row]);
    }
  }

  // Outputs are made only where one can be the highest.
  void choose_from_bounded(const Prepared* rows, int num_rows, int64_t first_row) const {
    static thread_local Scratch scratch;
    SketchedRows sketched(*call_.sketch, linear_, num_rows, scratch);
    for_many(call_.num_threads, num_rows, kFewRounded, [&, this](int64_t row) {
      sketched.round(row, rows + row * row_stride_);
    });
    const PanelUnits units = sketched.units();
    for_units(call_.num_threads, units.count(), [&, this](int64_t unit) {
      sketched.multiply(units.at(unit), units.at(unit + call_.num_threads));
    });
    for_many(call_.num_threads, num_rows, 2, [&, this](int64_t row) {
      write(first_row + row, best_of(rows + row * row_stride_, sketched.bounds(row)));
    });
  }

  // Panel by panel, first that whose outputs can be highest, until none can have any as high as one that was made.
  Choice best_of(const Prepared* row, std::span<float> bounds) const {
    constexpr int kBounds = Panels::kColumns / kTileColumns;  // of a panel
    const PanelUnits panel_bounds{static_cast<int>(bounds.size()), kBounds};
    Choice best{Likeliest::kNone, 0, true};
    for (;;) {
      Likeliest highest;  // of bounds, by their places
      for_vectors(bounds.size(), [&](int i, int count) { highest.take(load_some(&bounds[i], count), i, count); });
      const auto [bound, place, _] = highest.choice();
      if (bound == Likeliest::kNone || bound < best.logit) return best;
      const int panel = place / kBounds;
      const PanelRange made = panel_bounds.at(panel);
      std::fill(&bounds[made.begin], &bounds[0] + made.end, Likeliest::kNone);
      Likeliest outputs;
      panels_.multiply(row, 1, {panel, panel + 1}, {panel + 1, panel + 1}, Look{*this, &outputs});
      best.meet(outputs.choice());
    }
  }

  // A function of its own, for inlined it would take the registers of the products before it.
  __attribute__((noinline)) void look_at(const SumBlock& block, Likeliest* likeliest) const {
    for_outputs(linear_, block, [=](int row, int column, int count, Floats x) {
      likeliest[row].take(x, column, count);
    });
  }

  void write(int64_t row, const Choice& choice) const {
    int64_t* to = static_cast<int64_t*>(call_.output) + row;
    to[0] = choice.token_id;
    to[call_.output_stride] = choice.is_finite;
  }

  const Linear& linear_;
  const LinearCall& call_;
  const Panels& panels_;
  const PanelUnits units_;
  const int64_t row_stride_;  // elements between prepared rows
};

}  // namespace pagoda
