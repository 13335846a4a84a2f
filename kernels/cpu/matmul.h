// The inner loop of every matrix product: a tile of the product in registers.
//
// The right side comes in panels of kPanel columns, contiguous, [depth][kPanel]; a row of it is one pair of vectors.
// Each element of the product is summed in the order of `depth`, whatever the tile: a row depends on no other row.
#pragma once

#include <cstdint>

#include "simd.h"

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

  // The same for bfloat16 on both sides, two of `depth` at a time: b is [depth / 2][kPanel][2]. Columns in their order.
  template <int kBytesAhead>
  void multiply(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t panel_stride, int depth) {
    for (int k = 0; k < depth; k += 2, b += 2 * kPanel) {
      Words columns[kPanels][2];
      for (int i = 0; i < kPanels; ++i) {
        std::memcpy(columns[i], b + i * panel_stride, sizeof columns[i]);
        prefetch_row(b + i * panel_stride + kBytesAhead / sizeof(BFloat16));
        prefetch_row(b + i * panel_stride + kBytesAhead / sizeof(BFloat16) + kPanel);
      }
      for (int row = 0; row < kRows; ++row) {
        uint32_t pair;
        std::memcpy(&pair, a + row * a_stride + k, sizeof pair);
        const Words x = pair - Words{};
        for (int i = 0; i < kPanels; ++i) {
          sums[row][i].first = add_dot(sums[row][i].first, x, columns[i][0]);
          sums[row][i].second = add_dot(sums[row][i].second, x, columns[i][1]);
        }
      }
    }
  }

 private:
  template <class Element>
  static void prefetch_row(const Element* row) {
    for (size_t byte = 0; byte < kPanel * sizeof(Element); byte += kAlignment) {
      prefetch(reinterpret_cast<const char*>(row) + byte);
    }
  }
};

}  // namespace pagoda
