// The matrix products of a model's layers, over weights packed once, with what comes before and after them.
//
// With few rows they are memory-bound: each weight is read once, in long contiguous runs, and unpacked in registers.
// With many they are compute-bound: a tile of rows stays in the L1 cache while some panels pass, those in the L2.
// All sums are float32, in the order of the inputs, so a row's result does not depend on how many others there are.
#include "linear.h"

#include <algorithm>

#include "../base/rows.h"
#include "../base/scratch.h"
#include "../base/team.h"
#include "choosing.h"
#include "packed.h"

namespace pagoda {
namespace {

constexpr int kMaxRows = 480;    // prepared at a time
constexpr int kFewPrepared = 8;  // rows are not worth waking other threads for

using Prepared = Panels::Prepared;

class Product {
 public:
  Product(const Linear& linear, const LinearCall& call)
      : linear_(linear),
        call_(call),
        depth_(depth_of(linear.num_inputs)),
        is_ready_(is_prepared()),
        row_stride_(is_ready_ ? call.input_stride : depth_ + kAlignment / sizeof(Prepared)),
        panels_(static_cast<const Element*>(linear.weight), depth_, row_stride_),
        units_(units()) {}

  void run() const {
    static thread_local Scratch scratch;
    const int64_t num_blocks = (call_.num_rows + kMaxRows - 1) / kMaxRows;
    const int64_t block_rows = num_blocks ? (call_.num_rows + num_blocks - 1) / num_blocks : 0;
    Prepared* const room =
        is_ready_ ? nullptr : reinterpret_cast<Prepared*>(scratch.floats(rows_of_tiles(block_rows) * row_stride_));
    for (int64_t first = 0; first < call_.num_rows; first += block_rows) {
      const int num_rows = std::min(call_.num_rows - first, block_rows);
      const Prepared* rows = room;
      if (is_ready_) {
        rows = static_cast<const Prepared*>(call_.input) + first * row_stride_;
      } else {
        for_many(call_.num_threads, num_rows, kFewPrepared, [=, this](int64_t row) {
          prepare(first + row, room + row * row_stride_);
        });
      }
      if (call_.output_kind == kChoose) {
        Choosing(linear_, call_, panels_, units_, row_stride_).run(rows, num_rows, first);
        continue;
      }
      for_units(call_.num_threads, units_.count(), [=, this](int64_t unit) {
        const int64_t next = unit + call_.num_threads;  // if all take as long
        panels_.multiply(rows, num_rows, units_.at(unit), units_.at(next), Finish{*this, first});
      });
    }
  }

 private:
  // What becomes of sums whose rows are counted from first_row on.
  struct Finish {
    const Product& product;
    int64_t first_row;

    void expect(int row, int end_row, int column, int num_columns) const {
      if (product.call_.output_kind != kAdd) return;
      product.prefetch_outputs(first_row + row, first_row + end_row, column, num_columns);
    }
    void operator()(const SumBlock& block) const { product.finish(block, first_row); }
  };

  // Whether the input is as it would be prepared, and can be read as far.
  bool is_prepared() const {
    return std::is_same_v<Prepared, Element> && call_.input_kind == kPlain && depth_ == linear_.num_inputs &&
           (call_.num_rows <= kTileHeight || call_.readable_rows >= rows_of_tiles(call_.num_rows));
  }

  // Large units where there are enough of them for all threads to end together.
  PanelUnits units() const {
    PanelUnits units{num_panels_of(linear_.num_outputs), Panels::kMaxUnit};
    const auto is_too_large = [&] {
      return units.unit * depth_ * Panels::kColumns * static_cast<int64_t>(sizeof(Element)) > Panels::kMaxUnitBytes ||
             units.num_panels < 4 * units.unit * call_.num_threads;
    };
    while (units.unit > 1 && is_too_large()) units.unit /= 2;
    return units;
  }

  void prepare(int64_t row, Prepared* to) const {
    const Element* from = static_cast<const Element*>(call_.input) + row * call_.input_stride;
    const int width = linear_.num_inputs;
    std::fill(to + width, to + depth_, Prepared{});
    switch (call_.input_kind) {
      case kPlain: return convert(from, to, width);
      case kNormed:
        return normalize(from, static_cast<const Element*>(call_.norm_weight), to, width, call_.norm_epsilon);
    }
  }

  // What is added to was mostly written by another thread: it takes long to come from that one's cache.
  void prefetch_outputs(int64_t row, int64_t end_row, int column, int num_columns) const {
    for (; row < end_row; ++row) {
      const Element* to = static_cast<const Element*>(call_.output) + row * call_.output_stride + column;
      for (int i = 0; i < num_columns; i += kAlignment / sizeof(Element)) prefetch(to + i);
    }
  }

  // Rows are counted from first_row on.
  void finish(const SumBlock& block, int64_t first_row) const {
    switch (call_.output_kind) {
      case kWrite: return finish_rows<Element>(block, first_row, [](const Element*, int, Floats x) { return x; });
      case kWriteFloat: return finish_rows<float>(block, first_row, [](const float*, int, Floats x) { return x; });
      case kAdd:
        return finish_rows<Element>(block, first_row, [](const Element* before, int count, Floats x) {
          return load_some(before, count) + x;
        });
      case kWriteGated: return finish_gated(block, first_row);
      case kChoose: return;  // see choosing.h
    }
  }

  template <class To, class Combine>
  void finish_rows(const SumBlock& block, int64_t first_row, Combine combine) const {
    for_outputs(linear_, block, [=, this](int row, int column, int count, Floats x) {
      To* to = static_cast<To*>(call_.output) + (first_row + row) * call_.output_stride + column;
      store_some(to, combine(to, count, x), count);
    });
  }

  // Of each panel's halves one vector, or part of one.
  void finish_gated(const SumBlock& block, int64_t first_row) const {
    const int width = linear_.num_outputs / 2, first = block.first_column / 2;
    const int num_columns = std::min(block.num_columns / 2, width - first);
    const auto* bias = static_cast<const Element*>(linear_.bias);
    for (int row = block.first_row; row < block.end_row; ++row) {
      const float* sums = block.sums + (row - block.first_row) * block.stride;
      Element* to = static_cast<Element*>(call_.output) + (first_row + row) * call_.output_stride + first;
      for_vectors(num_columns, [=](int column, int count) {
        Floats gate = half_columns<0>(sums, column, count), up = half_columns<1>(sums, column, count);
        if (bias) {
          gate += load_some(bias + first + column, count);
          up += load_some(bias + width + first + column, count);
        }
        store_some(to + column, silu(gate) * up, count);
      });
    }
  }

  // The first or the second halves of panels, side by side: columns `column` to `column + count` of them.
  template <int half>
  static Floats half_columns(const float* sums, int column, int count) {
    constexpr int kHalf = Panels::kColumns / 2;
    const auto at = [=](int i) { return sums + i / kHalf * Panels::kColumns + half * kHalf + i % kHalf; };
    if constexpr (kHalf % kLanes == 0) {
      return load(at(column));
    } else {
      return load_two(at(column), count > kHalf ? at(column + kHalf) : at(column));
    }
  }

  const Linear& linear_;
  const LinearCall& call_;
  int64_t depth_;       // depth_of the inputs
  bool is_ready_;       // is_prepared()
  int64_t row_stride_;  // elements between prepared rows; rows of a tile do not lie in the same sets of the cache
  Panels panels_;
  PanelUnits units_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call) {
  pagoda::Product(*linear, *call).run();
}

#pragma GCC visibility pop
