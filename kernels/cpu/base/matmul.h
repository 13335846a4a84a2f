// The inner loop of every matrix product in float32: a tile of the product in registers.
//
// The right side comes in panels of kPanel columns, contiguous, [depth][kPanel]; a row of it is one pair of vectors.
// Each element of the product is summed in the order of `depth`, whatever the tile: a row depends on no other row.
#pragma once

#include <cstdint>

#include "elements.h"
#include "weights_ahead.h"

namespace pagoda {

constexpr int kPanel = kPair;                     // columns
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // with one panel, their accumulators fill the registers

template <int kRows, int kPanels = 1>
struct ProductTile {
  FloatPair sums[kRows][kPanels];

  // sums += a[kRows][depth] * b[depth][kPanels * kPanel]; panels of b are panel_stride elements apart. kBytesAhead of
  // each are prefetched. Columns come out in the order in which load_pair has them.
  template <int kBytesAhead = 0, class Element>
  void multiply(const float* a, int64_t a_stride, const Element* b, int64_t panel_stride, int depth) {
    for (int k = 0; k < depth; ++k, b += kPanel) {
      FloatPair columns[kPanels];
      for (int i = 0; i < kPanels; ++i) {
        columns[i] = load_pair(b + i * panel_stride);
        if constexpr (kBytesAhead > 0) prefetch_row(b + i * panel_stride + kBytesAhead / sizeof(Element));
      }
      for (int row = 0; row < kRows; ++row) {
        const Floats x = broadcast(a[row * a_stride + k]);
        for (int i = 0; i < kPanels; ++i) {
          sums[row][i].first += x * columns[i].first;
          sums[row][i].second += x * columns[i].second;
        }
      }
    }
  }

 private:
  template <class Element>
  static void prefetch_row(const Element* row) {
    for (size_t byte = 0; byte < kPanel * sizeof(Element); byte += kAlignment) {
      prefetch_weights(reinterpret_cast<const char*>(row) + byte);
    }
  }
};

}  // namespace pagoda
