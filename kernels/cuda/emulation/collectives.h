// What the lanes of a warp do together: barrier, shuffle, ldmatrix, mma; and asynchronous copies.
//
// Each lane posts its operands; the last to arrive computes the results of all 32.
#pragma once

#include <cstring>
#include <type_traits>

#include "block.h"
#include "../element.cuh"

namespace emulation {

// Waited-for copies become visible.
inline void land_copies(Thread& thread) {
  for (const Copy& copy : thread.copies.arrived) {
    if (copy.source) {
      std::memcpy(copy.destination, copy.source, 16);
    } else {
      std::memset(copy.destination, 0, 16);
    }
  }
  thread.copies.arrived.clear();
}

// compute(posts, results): const Post (&)[32] -> Result (&)[32]. Returns this lane's result.
template <typename Result, typename Post, typename Compute>
Result collective(const char* operation, const Post& post, Compute compute) {
  static_assert(sizeof(Post) <= kMaxPostBytes && sizeof(Result) <= kMaxPostBytes);
  static_assert(std::is_trivially_copyable_v<Post> && std::is_trivially_copyable_v<Result>);
  Block& block = *Block::running();
  Warp& warp = block.warp();
  const int lane = block.thread().lane();
  std::memcpy(warp.posts[lane], &post, sizeof(Post));
  if (block.arrive_in_warp(operation)) {
    Post posts[kWarpSize];
    Result results[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) std::memcpy(&posts[i], warp.posts[i], sizeof(Post));
    compute(posts, results);
    for (int i = 0; i < kWarpSize; ++i) std::memcpy(warp.results[i], &results[i], sizeof(Result));
    block.release_warp();
  }
  Result result;
  std::memcpy(&result, warp.results[lane], sizeof(Result));
  return result;
}

struct Registers4 {
  uint32_t values[4];
};

struct MmaOperands {
  float c[4];
  uint32_t a[4];
  uint32_t b[2];
};

struct MmaResult {
  float c[4];
};

// c[16][8] += a[16][16] b[16][8], in the register layout of the PTX ISA.
template <typename Element>
void compute_mma(const MmaOperands (&posts)[kWarpSize], MmaResult (&results)[kWarpSize]) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[row + 8 * (i % 2)][pair + 8 * (i / 2) + half] = half_of_register<Element>(posts[lane].a[i], half);
        if (i < 2) b[pair + 8 * i + half][row] = half_of_register<Element>(posts[lane].b[i], half);
      }
      c[row + 8 * (i / 2)][pair + i % 2] = posts[lane].c[i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 4; ++i) results[lane].c[i] = c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
  }
}

// The 8 rows of a matrix are read at once only if they lie in different groups of banks: 16 bytes wide, 8 of them.
inline void check_banks(const char* const* rows) {
  unsigned groups = 0;
  for (int row = 0; row < 8; ++row) groups |= 1u << reinterpret_cast<uintptr_t>(rows[row]) / 16 % 8;
  if (groups != 0xFF) Block::running()->fail("ldmatrix meets a bank conflict");
}

// Lane i holds the address of row i % 8 of matrix i / 8; each row is 8 halves.
template <bool kTransposed>
void compute_ldmatrix(const char* const (&rows)[kWarpSize], Registers4 (&results)[kWarpSize]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    check_banks(rows + matrix * 8);
    uint16_t halves[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(halves[row], rows[matrix * 8 + row], 16);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint16_t low = kTransposed ? halves[minor][major] : halves[major][minor];
      const uint16_t high = kTransposed ? halves[minor + 1][major] : halves[major][minor + 1];
      results[lane].values[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace emulation
