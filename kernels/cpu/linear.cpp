// The matrix products of a model's layers, over weights packed once, with what comes before and after them.
//
// With few rows they are memory-bound: each weight is read once, in long contiguous runs, and unpacked in registers.
// With many they are compute-bound: a tile of rows stays in the L1 cache while some panels pass, those in the L2.
// All sums are float32, in the order of the inputs, so a row's result does not depend on how many others there are.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "dot_panels.h"
#include "likeliest.h"
#include "panels.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace pagoda {
namespace {

constexpr int kMaxRows = 480;             // prepared at a time
constexpr int kFewPrepared = 8;           // rows are not worth waking other threads for
constexpr int kMaxParts = 64;             // that outputs are chosen from, each by one thread

using Panels = std::conditional_t<kHasDots && std::is_same_v<Element, BFloat16>, DotPanels, FloatPanels>;
using Prepared = Panels::Prepared;

int num_panels_of(const Linear& linear) { return (linear.num_outputs + Panels::kColumns - 1) / Panels::kColumns; }

int64_t depth_of(int64_t num_inputs) {
  return (num_inputs + Panels::kDepthStep - 1) / Panels::kDepthStep * Panels::kDepthStep;
}

class Product {
 public:
  Product(const Linear& linear, const LinearCall& call)
      : linear_(linear),
        call_(call),
        num_panels_(num_panels_of(linear)),
        depth_(depth_of(linear.num_inputs)),
        is_ready_(is_prepared()),
        row_stride_(is_ready_ ? call.input_stride : depth_ + kAlignment / sizeof(Prepared)),
        panels_(static_cast<const Element*>(linear.weight), depth_, row_stride_),
        unit_panels_(panels_per_unit()),
        num_units_((num_panels_ + unit_panels_ - 1) / unit_panels_) {}

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
        choose(rows, num_rows, first);
        continue;
      }
      for_units(call_.num_threads, num_units_, [=, this](int64_t unit) {
        const int64_t next = unit + call_.num_threads;  // if all take as long
        multiply(rows, num_rows, unit, next, Finish{*this, first});
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

  // Those that are looked at.
  struct Look {
    const Product& product;
    Likeliest* likeliest;

    void expect(int, int, int, int) const {}
    void operator()(const SumBlock& block) const { product.look_at(block, likeliest); }
  };

  template <class Write>
  void multiply(const Prepared* rows, int num_rows, int64_t unit, int64_t next, const Write& write) const {
    panels_.multiply(rows, num_rows, panels_of(unit), panels_of(next), write);
  }

  // None, past the last.
  PanelRange panels_of(int64_t unit) const {
    const int64_t begin = std::min<int64_t>(unit * unit_panels_, num_panels_);
    return {static_cast<int>(begin), static_cast<int>(std::min<int64_t>(begin + unit_panels_, num_panels_))};
  }

  // Outputs are looked at while they pass: nobody writes them down.
  void choose(const Prepared* rows, int num_rows, int64_t first_row) const {
    const int num_parts = std::min(num_units_, kMaxParts);
    std::vector<Choice> choices(num_parts * num_rows);
    for_units(call_.num_threads, num_parts, [&, this](int64_t part) {
      std::vector<Likeliest> likeliest(num_rows);
      for (int64_t unit = num_units_ * part / num_parts; unit < num_units_ * (part + 1) / num_parts; ++unit) {
        multiply(rows, num_rows, unit, unit + 1, Look{*this, likeliest.data()});
      }
      for (int row = 0; row < num_rows; ++row) choices[part * num_rows + row] = likeliest[row].choice();
    });
    int64_t* to = static_cast<int64_t*>(call_.output) + first_row;
    for (int row = 0; row < num_rows; ++row) {
      Choice& choice = choices[row];
      for (int part = 1; part < num_parts; ++part) choice.meet(choices[part * num_rows + row]);
      to[row] = choice.token_id;
      to[call_.output_stride + row] = choice.is_finite;
    }
  }

  // A function of its own, for inlined it would take the registers of the products before it.
  __attribute__((noinline)) void look_at(const SumBlock& block, Likeliest* likeliest) const {
    for_sums(block, [=](int row, int column, int count, Floats x) { likeliest[row].take(x, column, count); });
  }

  // Whether the input is as it would be prepared, and can be read as far.
  bool is_prepared() const {
    return std::is_same_v<Prepared, Element> && call_.input_kind == kPlain && depth_ == linear_.num_inputs &&
           (call_.num_rows <= kTileHeight || call_.readable_rows >= rows_of_tiles(call_.num_rows));
  }

  // Large units where there are enough of them for all threads to end together.
  int panels_per_unit() const {
    int count = Panels::kMaxUnit;
    const auto is_too_large = [&] {
      return count * depth_ * Panels::kColumns * static_cast<int64_t>(sizeof(Element)) > Panels::kMaxUnitBytes ||
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
      case kChoose: return;  // see choose
    }
  }

  // Calls apply(row of the block, column, count, outputs) for vectors of `count` columns.
  template <class Apply>
  void for_sums(const SumBlock& block, const Apply& apply) const {
    const int num_columns = std::min(block.num_columns, linear_.num_outputs - block.first_column);
    const auto* bias = static_cast<const Element*>(linear_.bias);
    for (int row = block.first_row; row < block.end_row; ++row) {
      const float* sums = block.sums + (row - block.first_row) * block.stride;
      for_vectors(num_columns, [&](int i, int count) {
        Floats x = load(sums + i);
        if (bias) x += load_some(bias + block.first_column + i, count);
        apply(row, block.first_column + i, count, x);
      });
    }
  }

  template <class To, class Combine>
  void finish_rows(const SumBlock& block, int64_t first_row, Combine combine) const {
    for_sums(block, [=, this](int row, int column, int count, Floats x) {
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
  int num_panels_;
  int64_t depth_;       // inputs, and zeros up to a whole step
  bool is_ready_;       // is_prepared()
  int64_t row_stride_;  // elements between prepared rows; rows of a tile do not lie in the same sets of the cache
  Panels panels_;
  int unit_panels_, num_units_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// Elements of a packed weight.
extern "C" int64_t pagoda_packed_size(int32_t num_outputs, int32_t num_inputs) {
  using namespace pagoda;
  return (num_outputs + Panels::kColumns - 1) / Panels::kColumns * Panels::kColumns * depth_of(num_inputs);
}

// weight: [num_outputs, num_inputs], contiguous, gates before what they open; packed: see Linear.
extern "C" void pagoda_pack(const void* weight, void* packed, int32_t num_outputs, int32_t num_inputs, int32_t is_gated,
                            int32_t num_threads) {
  using namespace pagoda;
  constexpr int kColumns = Panels::kColumns;
  const int64_t depth = depth_of(num_inputs);
  for_units(num_threads, (num_outputs + kColumns - 1) / kColumns, [=](int64_t panel) {
    const Element* rows[kColumns];  // of the panel's columns; null where there is none
    for (int column = 0; column < kColumns; ++column) {
      const int half = is_gated ? kColumns / 2 : kColumns, width = is_gated ? num_outputs / 2 : num_outputs;
      const int64_t row = panel * half + column % half;
      const auto* first = static_cast<const Element*>(weight);
      rows[column] = row < width ? first + (row + column / half * width) * num_inputs : nullptr;
    }
    Element* to = static_cast<Element*>(packed) + panel * kColumns * depth;
    for (int64_t group = 0; group < depth; group += Panels::kGroup) {
      for (const Element* row : rows) {
        for (int64_t k = group; k < group + Panels::kGroup; ++k) *to++ = row && k < num_inputs ? row[k] : Element{};
      }
    }
  });
}

extern "C" void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call) {
  pagoda::Product(*linear, *call).run();
}

#pragma GCC visibility pop
