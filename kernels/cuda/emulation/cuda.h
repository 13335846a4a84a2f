// CUDA C++ as the kernels use it, for a host compiler: qualifiers, built-in variables, barriers, launches, and the
// host counterparts of every function in intrinsics.cuh.
#pragma once

#include <cmath>
#include <cstdint>

#include "qualifiers.h"

#include "collectives.h"
#include "guarded_memory.h"

using std::max;
using std::min;

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

// The launch that runs now.
struct Grid {
  dim3 block_index;
  GuardedMemory shared;
};

inline thread_local Grid grid;
inline uint64_t seed = 0;
inline std::string last_failure;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return Block::running()->thread().index; }
  } x;
};

struct BlockIndex {
  struct X {
    operator unsigned() const { return grid.block_index.x; }
  } x;
  struct Y {
    operator unsigned() const { return grid.block_index.y; }
  } y;
};

// Runs the grid's blocks one after the other, in an order drawn from the seed. Returns whether all went well.
template <typename Kernel, typename Args>
bool launch(Kernel kernel, dim3 blocks, int num_threads, size_t shared_bytes, const Args& args) {
  static thread_local Block block;
  std::vector<unsigned> order(blocks.x * blocks.y);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  for (unsigned index : order) {
    grid.block_index = dim3(index % blocks.x, index / blocks.x);
    grid.shared.allocate(shared_bytes);
    grid.shared.fill(0xFF);  // NaN in every dtype
    last_failure = block.run(num_threads, seed == 0 ? 0 : random(), [&] { kernel(args); });
    if (!last_failure.empty()) return false;
  }
  return true;
}

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;
inline emulation::BlockIndex blockIdx;

#define PAGODA_TEXT_OF(x) #x
#define PAGODA_TEXT(x) PAGODA_TEXT_OF(x)
#define __syncthreads() emulation::synchronize_block("__syncthreads, line " PAGODA_TEXT(__LINE__))
#define __syncwarp() emulation::synchronize_warp()

namespace emulation {

inline void synchronize_block(const char* where) {
  land_copies(Block::running()->thread());
  Block::running()->wait_for_block(where);
}

inline void wait_for_groups(int num_left) {
  Copies& copies = Block::running()->thread().copies;
  while (static_cast<int>(copies.committed.size()) > num_left) {
    const auto& oldest = copies.committed.front();
    copies.arrived.insert(copies.arrived.end(), oldest.begin(), oldest.end());
    copies.committed.erase(copies.committed.begin());
  }
}

inline void synchronize_warp() {
  land_copies(Block::running()->thread());
  collective<char>("__syncwarp", char(0), [](const char (&)[kWarpSize], char (&)[kWarpSize]) {});
}

}  // namespace emulation

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  using emulation::kWarpSize;
  return emulation::collective<Value>(
      "__shfl_xor_sync", value, [mask](const Value (&values)[kWarpSize], Value (&results)[kWarpSize]) {
        for (int lane = 0; lane < kWarpSize; ++lane) results[lane] = values[lane ^ mask];
      });
}

inline float __shfl_sync(unsigned, float value, int source_lane) {
  struct Post {
    float value;
    int source_lane;
  };
  using emulation::kWarpSize;
  return emulation::collective<float>(
      "__shfl_sync", Post{value, source_lane}, [](const Post (&posts)[kWarpSize], float (&results)[kWarpSize]) {
        for (int lane = 0; lane < kWarpSize; ++lane) results[lane] = posts[posts[lane].source_lane % kWarpSize].value;
      });
}

inline int __any_sync(unsigned, int predicate) {
  using emulation::kWarpSize;
  return emulation::collective<int>(
      "__any_sync", predicate, [](const int (&predicates)[kWarpSize], int (&results)[kWarpSize]) {
        int is_any = 0;
        for (int lane = 0; lane < kWarpSize; ++lane) is_any |= predicates[lane] != 0;
        for (int lane = 0; lane < kWarpSize; ++lane) results[lane] = is_any;
      });
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

// Blocks run one after the other: what one wrote, the next ones see.
inline void __threadfence() {}

inline char* dynamic_shared_memory() { return emulation::grid.shared.data(); }

inline float exp2_approximate(float x) { return exp2f(x); }

// Poisons the destination until the copy was waited for and a barrier passed.
inline void copy_async_16(void* destination, const void* source, bool reads_source) {
  std::memset(destination, 0xFF, 16);
  emulation::Block::running()->thread().copies.open.push_back(
      {static_cast<char*>(destination), reads_source ? static_cast<const char*>(source) : nullptr});
}

inline void commit_copies() {
  emulation::Copies& copies = emulation::Block::running()->thread().copies;
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kGroupsLeft>
void wait_for_copies() {
  emulation::wait_for_groups(kGroupsLeft);
}

template <bool kTransposed>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  const auto loaded = emulation::collective<emulation::Registers4>(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", static_cast<const char*>(row),
      emulation::compute_ldmatrix<kTransposed>);
  std::memcpy(registers, loaded.values, sizeof(registers));
}

template <typename Element>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulation::MmaOperands operands{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto result = emulation::collective<emulation::MmaResult>("mma", operands, emulation::compute_mma<Element>);
  std::memcpy(c, result.c, sizeof(c));
}

template <typename Kernel, typename Args>
int launch(Kernel kernel, dim3 blocks, int num_threads, size_t shared_bytes, cudaStream_t, const Args& args) {
  return emulation::launch(kernel, blocks, num_threads, shared_bytes, args) ? 0 : 1;
}
