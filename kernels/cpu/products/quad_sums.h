// Sums of products of quads of bytes in vectors, on CPUs with units for it (AVX512-VNNI), or written out in plain C++.
#pragma once

#include "../base/elements.h"

namespace pagoda {

#if defined(__AVX512VNNI__) || defined(PAGODA_TILES) || defined(PAGODA_BF16_DOTS)
constexpr bool kHasQuads = true;
#else
constexpr bool kHasQuads = false;
#endif

// Exact. Bytes on the left have a sign, those on the right have none. See pair_sums.h.
struct QuadSum {
  using Element = uint8_t;
  using Left = Words;
  static constexpr int kRegisters = 1;
  Words total = {};

  static Left left(const uint8_t* quad) { return broadcast_words(quad); }
  void add(Left left, Words right) { total = add_quads(total, right, left); }
  void end_step() {}
  Floats floats() const {
    return __builtin_convertvector(reinterpret_cast<VectorOf<int32_t>::type>(total), Floats);
  }
};

}  // namespace pagoda
