// Products of bfloat16 by tiles: AMX's registers and operations, or the same written out in plain C++.
//
// A tile has up to 16 rows of 64 bytes. A left one holds rows of 32 elements; a right one 16 pairs of the depth, of 16
// columns each; their product is added to a tile of sums, 16 columns of float32. Of left and of right tiles there are
// two; the second ones may be half as deep.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"

namespace pagoda {

constexpr int kTileHeight = 16;   // rows of left tiles and of sums, at most
constexpr int kTileColumns = 16;  // of right tiles and of sums
constexpr int kTilePairs = 16;    // of the depth
constexpr int kTileSums = 4;      // tiles of sums at once

// num_rows, up to a whole tile of them.
constexpr int64_t rows_of_tiles(int64_t num_rows) { return (num_rows + kTileHeight - 1) / kTileHeight * kTileHeight; }

#ifdef __AMX_BF16__

// What LDTILECFG takes: the shape of each register.
struct alignas(kAlignment) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int height, int second_pairs) {
    for (int i = 0; i < kTileSums; ++i) set(i, height, 4 * kTileColumns);
    for (int i = 0; i < 2; ++i) {
      const int num_pairs = i == 0 ? kTilePairs : second_pairs;
      set(kTileSums + i, height, 4 * num_pairs);
      set(kTileSums + 2 + i, num_pairs, 4 * kTileColumns);
    }
  }

 private:
  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = num_rows;
    row_bytes[tile] = num_bytes;
  }
};

// This thread's tiles. The compiler's own intrinsics don't tell it that they read and write memory.
class Tiles {
 public:
  // For `height` rows, and second tiles of so many pairs. Who ran on this thread before may have used tiles of other
  // shapes, or none.
  static void set_up(int height, int second_pairs) {
    const TileShapes wanted(height, second_pairs);
    char found[sizeof wanted];
    asm volatile("sttilecfg %0" : "=m"(found));
    if (std::memcmp(found, &wanted, sizeof wanted)) asm volatile("ldtilecfg %0" ::"m"(wanted));
  }

  template <int i>
  static void clear_sums() {
    asm volatile("tilezero %%tmm%c0" ::"i"(i));
  }
  template <int i>
  static void load_sums(const float* rows, int64_t stride) {
    load<i>(rows, stride * sizeof(float));
  }
  template <int i>
  static void store_sums(float* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(i), "r"(rows), "r"(stride * sizeof(float)) : "memory");
  }

  template <int i>
  static void load_left(const BFloat16* rows, int64_t stride) {
    load<kTileSums + i>(rows, stride * sizeof(BFloat16));
  }
  // is_passing: it is not to take the place of others in the L1 cache.
  template <int i, bool is_passing>
  static void load_right(const BFloat16* rows, int64_t stride) {
    if constexpr (is_passing) {
      const int64_t stride_bytes = stride * sizeof(BFloat16);
      asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(kTileSums + 2 + i), "r"(rows), "r"(stride_bytes) : "memory");
    } else {
      load<kTileSums + 2 + i>(rows, stride * sizeof(BFloat16));
    }
  }

  // sums += left * right: which of each.
  template <int sums, int left, int right>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(kTileSums + left), "i"(kTileSums + 2 + right));
  }

 private:
  template <int i>
  static void load(const void* rows, int64_t stride_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(i), "r"(rows), "r"(stride_bytes) : "memory");
  }
};

// Where sums are made by vectors, too: as long as it lives, what is too small for a normal number is 0, as it is to
// tiles.
class SmallIsZero {
 public:
  SmallIsZero() { _mm_setcsr(before_ | kDenormalsAreZero | kFlushToZero); }
  ~SmallIsZero() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kDenormalsAreZero = 0x0040, kFlushToZero = 0x8000;
  const unsigned before_ = _mm_getcsr();
};

#else

struct SmallIsZero {};

class Tiles {
 public:
  static void set_up(int height, int second_pairs) {
    registers().height = height;
    registers().pairs[1] = second_pairs;
  }

  template <int i>
  static void clear_sums() {
    std::memset(registers().sums[i], 0, sizeof registers().sums[i]);
  }
  template <int i>
  static void load_sums(const float* rows, int64_t stride) {
    for (int row = 0; row < registers().height; ++row) {
      std::memcpy(registers().sums[i][row], rows + row * stride, sizeof registers().sums[i][row]);
    }
  }
  template <int i>
  static void store_sums(float* rows, int64_t stride) {
    for (int row = 0; row < registers().height; ++row) {
      std::memcpy(rows + row * stride, registers().sums[i][row], sizeof registers().sums[i][row]);
    }
  }

  template <int i>
  static void load_left(const BFloat16* rows, int64_t stride) {
    for (int row = 0; row < registers().height; ++row) {
      std::memcpy(registers().left[i][row], rows + row * stride, 2 * sizeof(BFloat16) * registers().pairs[i]);
    }
  }
  template <int i, bool is_passing>
  static void load_right(const BFloat16* rows, int64_t stride) {
    for (int pair = 0; pair < registers().pairs[i]; ++pair) {
      std::memcpy(registers().right[i][pair], rows + pair * stride, sizeof registers().right[i][pair]);
    }
  }

  // Even and odd elements of the depth are summed apart, each from zero; then both are added.
  template <int sums, int left, int right>
  static void multiply() {
    Registers& r = registers();
    for (int row = 0; row < r.height; ++row) {
      float even[kTileColumns] = {}, odd[kTileColumns] = {};
      for (int pair = 0; pair < r.pairs[right]; ++pair) {
        const float x = to_float(r.left[left][row][2 * pair]), y = to_float(r.left[left][row][2 * pair + 1]);
        for (int column = 0; column < kTileColumns; ++column) {
          even[column] = std::fma(x, to_float(r.right[right][pair][2 * column]), even[column]);
          odd[column] = std::fma(y, to_float(r.right[right][pair][2 * column + 1]), odd[column]);
        }
      }
      for (int column = 0; column < kTileColumns; ++column) r.sums[sums][row][column] += even[column] + odd[column];
    }
  }

 private:
  struct Registers {
    int height;
    int pairs[2] = {kTilePairs, kTilePairs};
    float sums[kTileSums][kTileHeight][kTileColumns];
    BFloat16 left[2][kTileHeight][2 * kTilePairs];
    BFloat16 right[2][kTilePairs][2 * kTileColumns];
  };
  static Registers& registers() {
    static thread_local Registers all;
    return all;
  }
  static float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

#endif

}  // namespace pagoda
