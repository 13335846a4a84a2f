// Packs weights: see `Linear`, and `Sketch`.
#include <algorithm>
#include <vector>

#include "../base/team.h"
#include "packed.h"
#include "sketch.h"

namespace pagoda {
namespace {

// The weights of one output, [num_inputs].
void read_output(const Linear& linear, int64_t output, Element* weights) {
  constexpr int kColumns = Panels::kColumns, kGroup = Panels::kGroup;
  const int64_t panel_size = kColumns * depth_of(linear.num_inputs);
  const auto* panel = static_cast<const Element*>(linear.weight) + output / kColumns * panel_size;
  for (int k = 0; k < linear.num_inputs; ++k) {
    weights[k] = panel[k / kGroup * kColumns * kGroup + output % kColumns * kGroup + k % kGroup];
  }
}

// Rounds the outputs of one panel of a sketch.
void sketch_panel(const Linear& linear, const Sketch& sketch, int64_t panel) {
  const int64_t depth = sketch_depth_of(linear.num_inputs);
  std::vector<Element> weights(linear.num_inputs);
  std::vector<Int8> steps(depth);
  float length = 0.0f, gap = 0.0f;
  for (int column = 0; column < kTileColumns; ++column) {
    const int64_t output = panel * kTileColumns + column;
    const bool is_there = output < linear.num_outputs;
    if (is_there) read_output(linear, output, weights.data());
    const Rounded rounded = round_to_steps(weights.data(), is_there ? linear.num_inputs : 0, steps.data());
    if (!is_there) std::fill(steps.begin(), steps.end(), Int8{});
    length = std::max(length, rounded.length);
    gap = std::max(gap, rounded.gap);
    sketch.steps[output] = rounded.step;
    uint8_t* to = sketch.quads + panel * kTileColumns * depth + column * 4;
    for (int64_t k = 0; k < depth; ++k) to[k / 4 * kTileColumns * 4 + k % 4] = steps[k].bits + 128;
  }
  sketch.lengths[panel] = length;
  sketch.gaps[panel] = gap;
}

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// Elements of a packed weight.
extern "C" int64_t pagoda_packed_size(int32_t num_outputs, int32_t num_inputs) {
  using namespace pagoda;
  return int64_t{num_panels_of(num_outputs)} * Panels::kColumns * depth_of(num_inputs);
}

// weight: [num_outputs, num_inputs], contiguous, gates before what they open; packed: see Linear.
extern "C" void pagoda_pack(const void* weight, void* packed, int32_t num_outputs, int32_t num_inputs, int32_t is_gated,
                            int32_t num_threads) {
  using namespace pagoda;
  constexpr int kColumns = Panels::kColumns;
  const int64_t depth = depth_of(num_inputs);
  for_units(num_threads, num_panels_of(num_outputs), [=](int64_t panel) {
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

// Bytes of a sketch's quads; 0 where there are no units for it.
extern "C" int64_t pagoda_sketch_bytes(int32_t num_outputs, int32_t num_inputs) {
  using namespace pagoda;
  return kHasQuads ? int64_t{sketch_panels_of(num_outputs)} * kTileColumns * sketch_depth_of(num_inputs) : 0;
}

// Makes one, of a weight without bias, in the memory that it names.
extern "C" void pagoda_sketch(const pagoda::Linear* linear, const pagoda::Sketch* sketch, int32_t num_threads) {
  using namespace pagoda;
  for_units(num_threads, sketch_panels_of(linear->num_outputs), [=](int64_t panel) {
    sketch_panel(*linear, *sketch, panel);
  });
}

#pragma GCC visibility pop
