// Matrix products of float32 panels, the inner loops of prefill.
//
// A panel is kPanel columns wide and contiguous: b[depth][kPanel]. Each element of the product is summed in the order
// of `depth`, whatever the tile it is computed in.
#pragma once

#include <cstdint>

#include "simd.h"

namespace pagoda {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;        // columns
constexpr int kTileRows = kLanes == 16 ? 12 : 6;      // accumulators fill the registers

// c[kTileRows][kPanel] = c * decay[row] + a[kTileRows][depth] * b[depth][kPanel]; c starts at 0 without `decay`.
template <bool kAccumulate>
inline void multiply_tile(const float* a, int a_stride, const float* b, float* c, int c_stride, int depth,
                          const float* decay) {
  Floats sums[kTileRows][kPanelVectors] = {};
  if constexpr (kAccumulate) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int i = 0; i < kPanelVectors; ++i) sums[row][i] = load(c + row * c_stride + i * kLanes) * decay[row];
    }
  }
  for (int k = 0; k < depth; ++k, b += kPanel) {
    Floats columns[kPanelVectors];
    for (int i = 0; i < kPanelVectors; ++i) columns[i] = load(b + i * kLanes);
    for (int row = 0; row < kTileRows; ++row) {
      const Floats x = broadcast(a[row * a_stride + k]);
      for (int i = 0; i < kPanelVectors; ++i) sums[row][i] += x * columns[i];
    }
  }
  for (int row = 0; row < kTileRows; ++row) {
    for (int i = 0; i < kPanelVectors; ++i) store(c + row * c_stride + i * kLanes, sums[row][i]);
  }
}

}  // namespace pagoda
