// Prefetches weights that are read once, while few rows are multiplied.
#pragma once

#include "dots.h"
#include "elements.h"

namespace pagoda {

// A core has few places for lines on their way to the L1 cache, and one that comes from memory holds its place for
// long: on CPUs without tiles, weights come a tenth (one row) to a quarter (eight) faster if they are asked for for the
// L2 cache, and from there as they are read. Those with tiles were measured with the L1 cache alone.
inline void prefetch_weights(const void* address) {
  if constexpr (kHasTiles) {
    prefetch(address);
  } else {
    prefetch_far(address);
  }
}

}  // namespace pagoda
