// The matrix products of a model's layers, over weights packed once, with what comes before and after them.
//
// With few rows they are memory-bound: each weight is read once, in long contiguous runs, and unpacked in registers.
// With many they are compute-bound: a tile of rows stays in the L1 cache while some panels pass, those in the L2.
// All sums are float32, in the order of the inputs, so a row's result does not depend on how many others there are.
#include "linear.h"

#include <algorithm>

#include "matmul.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace pagoda {
namespace {

constexpr int kMaxRows = 480;             // as float32 at a time
constexpr int kFewRows = 8;               // are not worth waking other threads to prepare them
constexpr int kMaxUnitPanels = 4;         // of one thread's unit of work: they share a tile of rows in the L1 cache
constexpr int kMaxUnitBytes = 512 << 10;  // of weights, which stay in the L2 cache for all tiles
constexpr int kBytesAhead = 4096;         // from the weights in use to those that are prefetched, in each panel

// Panels side by side: few rows leave registers free, and need more streams and more independent sums.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

class Product {
 public:
  Product(const Linear& linear, const LinearCall& call)
      : linear_(linear),
        call_(call),
        num_panels_((linear.num_outputs + kPanel - 1) / kPanel),
        panel_stride_(static_cast<int64_t>(linear.num_inputs) * kPanel),
        unit_panels_(panels_per_unit()) {}

  void run() const {
    static thread_local Scratch scratch;
    const int64_t num_blocks = (call_.num_rows + kMaxRows - 1) / kMaxRows;
    const int64_t block_rows = num_blocks ? (call_.num_rows + num_blocks - 1) / num_blocks : 0;
    float* const prepared = scratch.floats(block_rows * linear_.num_inputs);
    const int num_units = (num_panels_ + unit_panels_ - 1) / unit_panels_;
    for (int64_t first = 0; first < call_.num_rows; first += block_rows) {
      const int num_rows = std::min(call_.num_rows - first, block_rows);
      for_many(call_.num_threads, num_rows, kFewRows, [=, this](int64_t row) {
        prepare(first + row, prepared + row * linear_.num_inputs);
      });
      for_units(call_.num_threads, num_units, [=, this](int64_t unit) {
        const int panel = unit * unit_panels_;
        multiply(prepared, first, num_rows, panel, std::min(unit_panels_, num_panels_ - panel));
      });
    }
  }

 private:
  // Large units where there are enough of them for all threads to end together.
  int panels_per_unit() const {
    int count = kMaxUnitPanels;
    const auto is_too_large = [&] {
      return count * panel_stride_ * static_cast<int64_t>(sizeof(Element)) > kMaxUnitBytes ||
             num_panels_ < 4 * count * call_.num_threads;
    };
    while (count > 1 && is_too_large()) count /= 2;
    return count;
  }

  void prepare(int64_t row, float* to) const {
    const Element* from = static_cast<const Element*>(call_.input) + row * call_.input_stride;
    const int width = linear_.num_inputs;
    switch (call_.input_kind) {
      case kPlain: return convert(from, to, width);
      case kGated: return gate(from, to, width);
      case kNormed:
        return normalize(from, static_cast<const Element*>(call_.norm_weight), to, width, call_.norm_epsilon);
    }
  }

  // Tiles of as equal heights as can be.
  void multiply(const float* rows, int64_t first_row, int num_rows, int panel, int num_panels) const {
    const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int begin = num_rows * tile / num_tiles, end = num_rows * (tile + 1) / num_tiles;
      const float* tile_rows = rows + static_cast<int64_t>(begin) * linear_.num_inputs;
      multiply_rows<kTileRows>(end - begin, tile_rows, first_row + begin, panel, num_panels);
    }
  }

  template <int kRows>
  void multiply_rows(int num_rows, const float* rows, int64_t row, int panel, int num_panels) const {
    if constexpr (kRows > 1) {
      if (num_rows < kRows) return multiply_rows<kRows - 1>(num_rows, rows, row, panel, num_panels);
    }
    multiply_panels<kRows, panels_at_once(kRows)>(rows, row, panel, panel + num_panels);
  }

  template <int kRows, int kPanels>
  void multiply_panels(const float* rows, int64_t row, int panel, int end) const {
    for (; panel + kPanels <= end; panel += kPanels) multiply_tile<kRows, kPanels>(rows, row, panel);
    if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(rows, row, panel, end);
  }

  template <int kRows, int kPanels>
  void multiply_tile(const float* rows, int64_t row, int panel) const {
    ProductTile<kRows, kPanels> tile = {};
    const Element* weight = static_cast<const Element*>(linear_.weight) + panel * panel_stride_;
    tile.template multiply<kBytesAhead>(rows, linear_.num_inputs, weight, panel_stride_, linear_.num_inputs);
    for (int i = 0; i < kPanels; ++i) {
      const int column = (panel + i) * kPanel, count = std::min(kPanel, linear_.num_outputs - column);
      const auto* bias = static_cast<const Element*>(linear_.bias);
      const FloatPair added = bias ? load_columns(bias + column, count) : FloatPair{};
      for (int r = 0; r < kRows; ++r) {
        const FloatPair x = tile.sums[r][i];
        write({x.first + added.first, x.second + added.second}, row + r, column, count);
      }
    }
  }

  void write(FloatPair x, int64_t row, int column, int count) const {
    const int64_t place = row * call_.output_stride + column;
    if (call_.output_kind == kWriteFloat) {
      return store_columns(static_cast<float*>(call_.output) + place, to_order<Element>(x), count);
    }
    Element* to = static_cast<Element*>(call_.output) + place;
    if (call_.output_kind == kAdd) {
      const FloatPair before = load_columns(to, count);
      x = {before.first + x.first, before.second + x.second};
    }
    store_columns(to, x, count);
  }

  static FloatPair load_columns(const Element* from, int count) {
    return count == kPanel ? load_pair(from) : load_pair_first(from, count);
  }

  template <class To>
  static void store_columns(To* to, FloatPair x, int count) {
    count == kPanel ? store_pair(to, x) : store_pair_first(to, x, count);
  }

  const Linear& linear_;
  const LinearCall& call_;
  int num_panels_;
  int64_t panel_stride_;  // elements
  int unit_panels_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// Outputs of a panel.
extern "C" int32_t pagoda_panel_size() { return pagoda::kPanel; }

// weight: [num_outputs, num_inputs], contiguous; packed: see Linear.
extern "C" void pagoda_pack(const void* weight, void* packed, int32_t num_outputs, int32_t num_inputs,
                            int32_t num_threads) {
  using namespace pagoda;
  const int num_panels = (num_outputs + kPanel - 1) / kPanel;
  for_units(num_threads, num_panels, [=](int64_t panel) {
    const int64_t first = panel * num_inputs * kPanel;
    const Element* from = static_cast<const Element*>(weight) + first;
    Element* to = static_cast<Element*>(packed) + first;
    const int num_columns = std::min<int64_t>(kPanel, num_outputs - panel * kPanel);
    for (int64_t k = 0; k < num_inputs; ++k, to += kPanel) {
      for (int column = 0; column < kPanel; ++column) {
        to[column] = column < num_columns ? from[column * num_inputs + k] : Element{};
      }
    }
  });
}

extern "C" void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call) {
  pagoda::Product(*linear, *call).run();
}

#pragma GCC visibility pop
