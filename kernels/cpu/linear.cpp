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

// Whether rows are rounded to bfloat16 and multiplied two inputs at a time, where the machine can do that at once.
#if defined(__AVX512BF16__) || defined(PAGODA_BF16_DOTS)
constexpr bool kIsDot = std::is_same_v<Element, BFloat16>;
#else
constexpr bool kIsDot = false;
#endif
using Prepared = std::conditional_t<kIsDot, BFloat16, float>;
constexpr int kInputGroup = kIsDot ? 2 : 1;  // inputs of a packed column that lie together

constexpr int64_t whole_groups(int64_t num_inputs) {
  return (num_inputs + kInputGroup - 1) / kInputGroup * kInputGroup;
}

// Panels side by side: few rows leave registers free, and need more streams and more independent sums.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

class Product {
 public:
  Product(const Linear& linear, const LinearCall& call)
      : linear_(linear),
        call_(call),
        num_panels_((linear.num_outputs + kPanel - 1) / kPanel),
        depth_(whole_groups(linear.num_inputs)),
        row_stride_(depth_ + kAlignment / sizeof(Prepared)),
        panel_stride_(depth_ * kPanel),
        unit_panels_(panels_per_unit()) {}

  void run() const {
    static thread_local Scratch scratch;
    const int64_t num_blocks = (call_.num_rows + kMaxRows - 1) / kMaxRows;
    const int64_t block_rows = num_blocks ? (call_.num_rows + num_blocks - 1) / num_blocks : 0;
    Prepared* const prepared = reinterpret_cast<Prepared*>(scratch.floats(block_rows * row_stride_));
    const int num_units = (num_panels_ + unit_panels_ - 1) / unit_panels_;
    for (int64_t first = 0; first < call_.num_rows; first += block_rows) {
      const int num_rows = std::min(call_.num_rows - first, block_rows);
      for_many(call_.num_threads, num_rows, kFewRows, [=, this](int64_t row) {
        prepare(first + row, prepared + row * row_stride_);
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

  void prepare(int64_t row, Prepared* to) const {
    const Element* from = static_cast<const Element*>(call_.input) + row * call_.input_stride;
    const int width = linear_.num_inputs;
    std::fill(to + width, to + depth_, Prepared{});
    switch (call_.input_kind) {
      case kPlain: return convert(from, to, width);
      case kGated: return gate(from, to, width);
      case kNormed:
        return normalize(from, static_cast<const Element*>(call_.norm_weight), to, width, call_.norm_epsilon);
    }
  }

  // Tiles of as equal heights as can be.
  void multiply(const Prepared* rows, int64_t first_row, int num_rows, int panel, int num_panels) const {
    const int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int begin = num_rows * tile / num_tiles, end = num_rows * (tile + 1) / num_tiles;
      const Prepared* tile_rows = rows + begin * row_stride_;
      multiply_rows<kTileRows>(end - begin, tile_rows, first_row + begin, panel, num_panels);
    }
  }

  template <int kRows>
  void multiply_rows(int num_rows, const Prepared* rows, int64_t row, int panel, int num_panels) const {
    if constexpr (kRows > 1) {
      if (num_rows < kRows) return multiply_rows<kRows - 1>(num_rows, rows, row, panel, num_panels);
    }
    multiply_panels<kRows, panels_at_once(kRows)>(rows, row, panel, panel + num_panels);
  }

  template <int kRows, int kPanels>
  void multiply_panels(const Prepared* rows, int64_t row, int panel, int end) const {
    for (; panel + kPanels <= end; panel += kPanels) multiply_tile<kRows, kPanels>(rows, row, panel);
    if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(rows, row, panel, end);
  }

  template <int kRows, int kPanels>
  void multiply_tile(const Prepared* rows, int64_t row, int panel) const {
    ProductTile<kRows, kPanels> tile = {};
    const Element* weight = static_cast<const Element*>(linear_.weight) + panel * panel_stride_;
    tile.template multiply<kBytesAhead>(rows, row_stride_, weight, panel_stride_, depth_);
    for (int i = 0; i < kPanels; ++i) {
      const int column = (panel + i) * kPanel, count = std::min(kPanel, linear_.num_outputs - column);
      const auto* bias = static_cast<const Element*>(linear_.bias);
      const FloatPair added = bias ? load_columns(bias + column, count) : FloatPair{};
      for (int r = 0; r < kRows; ++r) {
        const FloatPair x = kIsDot ? tile.sums[r][i] : to_order<Element>(tile.sums[r][i]);
        write({x.first + added.first, x.second + added.second}, row + r, column, count);
      }
    }
  }

  void write(FloatPair x, int64_t row, int column, int count) const {
    const int64_t place = row * call_.output_stride + column;
    if (call_.output_kind == kWriteFloat) return store_columns(static_cast<float*>(call_.output) + place, x, count);
    Element* to = static_cast<Element*>(call_.output) + place;
    if (call_.output_kind == kAdd) {
      const FloatPair before = load_columns(to, count);
      x = {before.first + x.first, before.second + x.second};
    }
    store_columns(to, x, count);
  }

  const Linear& linear_;
  const LinearCall& call_;
  int num_panels_;
  int64_t depth_;         // inputs, in whole groups
  int64_t row_stride_;    // elements between prepared rows; rows of a tile do not lie in the same sets of the cache
  int64_t panel_stride_;  // elements
  int unit_panels_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// Elements of a packed weight.
extern "C" int64_t pagoda_packed_size(int32_t num_outputs, int32_t num_inputs) {
  using namespace pagoda;
  return (num_outputs + kPanel - 1) / kPanel * kPanel * whole_groups(num_inputs);
}

// weight: [num_outputs, num_inputs], contiguous; packed: see Linear.
extern "C" void pagoda_pack(const void* weight, void* packed, int32_t num_outputs, int32_t num_inputs,
                            int32_t num_threads) {
  using namespace pagoda;
  const int num_panels = (num_outputs + kPanel - 1) / kPanel;
  for_units(num_threads, num_panels, [=](int64_t panel) {
    const Element* from = static_cast<const Element*>(weight) + panel * kPanel * num_inputs;
    Element* to = static_cast<Element*>(packed) + panel * kPanel * whole_groups(num_inputs);
    const int num_columns = std::min<int64_t>(kPanel, num_outputs - panel * kPanel);
    for (int64_t group = 0; group < num_inputs; group += kInputGroup) {
      for (int column = 0; column < kPanel; ++column) {
        for (int64_t k = group; k < group + kInputGroup; ++k) {
          *to++ = column < num_columns && k < num_inputs ? from[column * num_inputs + k] : Element{};
        }
      }
    }
  });
}

extern "C" void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call) {
  pagoda::Product(*linear, *call).run();
}

#pragma GCC visibility pop
