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

// A block that the device runs now, or has room for.
struct Resident {
  Block block;
  dim3 block_index;
  GuardedMemory shared;
};

constexpr int kNumResidents = 4;
inline thread_local Resident residents[kNumResidents];
inline thread_local Resident* resident = nullptr;  // the one whose threads run now
constexpr int kStay = 8;  // warps of a block go on so often, on average, before others' do
inline uint64_t seed = 0;
inline std::string last_failure;
inline void (*after_launch)() = [] {};  // called when a launch has ended

struct ThreadIndex {
  struct X {
    operator unsigned() const { return Block::running()->thread().index; }
  } x;
};

struct BlockIndex {
  struct X {
    operator unsigned() const { return resident->block_index.x; }
  } x;
  struct Y {
    operator unsigned() const { return resident->block_index.y; }
  } y;
};

// Runs the grid's blocks, several at once, in an order drawn from the seed; with seed 0, one after the other. Returns
// whether all went well.
template <typename Kernel, typename Args>
bool launch(Kernel kernel, dim3 blocks, int num_threads, size_t shared_bytes, const Args& args) {
  std::vector<unsigned> waiting(blocks.x * blocks.y);  // the last is the next
  for (unsigned i = 0; i < waiting.size(); ++i) waiting[waiting.size() - 1 - i] = i;
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(waiting.begin(), waiting.end(), random);

  const auto start = [&](Resident& free) {
    free.block_index = dim3(waiting.back() % blocks.x, waiting.back() / blocks.x);
    waiting.pop_back();
    free.shared.allocate(shared_bytes);
    free.shared.fill(0xFF);  // NaN in every dtype
    free.block.start(num_threads, seed == 0 ? 0 : random(), [&] { kernel(args); });
  };
  std::vector<Resident*> busy;
  for (Resident& free : residents) {
    if (waiting.empty() || (seed == 0 && !busy.empty())) break;
    start(free);
    busy.push_back(&free);
  }
  last_failure.clear();
  size_t chosen = 0;
  while (!busy.empty() && last_failure.empty()) {
    if (chosen >= busy.size() || random() % kStay == 0) chosen = random() % busy.size();
    resident = busy[chosen];
    if (resident->block.go_on()) continue;
    last_failure = resident->block.failure();
    if (!waiting.empty()) {
      start(*resident);
    } else {
      busy.erase(busy.begin() + chosen);
    }
  }
  after_launch();
  return last_failure.empty();
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

// Everyone sees at once what someone wrote.
inline void __threadfence() {}

inline char* dynamic_shared_memory() { return emulation::resident->shared.data(); }

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
