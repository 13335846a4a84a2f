// The emulated machine below translated kernels: what instructions.h leaves to it, and the C ABI of library.cu, whose
// own kernels, compiled by g++, give way to those of the PTX, which have the same names.
#include "kernels/cuda/emulation/qualifiers.h"

#undef __global__
#define __global__ __attribute__((weak, noipa))

#include "kernels/cuda/library.cu"

#include "instructions.h"
#include "weak_memory.h"

namespace ptx {

using emulation::kWarpSize;
constexpr int kMaxThreads = 1024;  // of a block

static void check(bool is_right, const char* what, const char* where) {
  if (!is_right) emulation::Block::running()->fail(std::string(what) + ": " + where);
}

static void check_lanes(uint32_t lanes, const char* where) {
  check(lanes == 0xFFFFFFFF, "not all lanes of a warp are named", where);
}

uint32_t thread_index() { return threadIdx.x; }

char* shared(uint32_t address, int num_bytes, const char* where) {
  const emulation::GuardedMemory& memory = emulation::resident->shared;
  const uint32_t offset = address - kSharedBase;
  check(address >= kSharedBase && offset + num_bytes <= memory.num_bytes(), "not in shared memory", where);
  check(address % num_bytes == 0, "misaligned", where);
  return memory.data() + offset;
}

// Of each multiprocessor, which has room for two blocks.
constexpr int kBlocksTogether = 2;
static thread_local View views[emulation::kNumResidents / kBlocksTogether];

static int resident_index() { return static_cast<int>(emulation::resident - emulation::residents); }
static View& view() { return views[resident_index() / kBlocksTogether]; }
static int thread_in_view() { return resident_index() * kMaxThreads + thread_index(); }

static const bool is_called_back = [] {
  emulation::after_launch = [] {
    for (View& one : views) one.end_launch();
  };
  return true;
}();

void load_global(char* to, uint64_t address, int num_bytes, const char* where) {
  check(address % num_bytes == 0, "misaligned", where);
  view().load(to, address, num_bytes);
}

void store_global(const char* from, uint64_t address, int num_bytes, const char* where) {
  check(address % num_bytes == 0, "misaligned", where);
  view().store(thread_in_view(), from, address, num_bytes);
}

void membar_gl() { view().fence(thread_in_view()); }

uint32_t block_index(int axis) { return axis == 0 ? blockIdx.x : blockIdx.y; }

void bar_sync(const char* where) { emulation::synchronize_block(where); }

void bar_warp_sync(uint32_t lanes, const char* where) {
  check_lanes(lanes, where);
  emulation::synchronize_warp();
}

uint32_t shfl_sync_bfly(uint32_t value, uint32_t lane_mask, uint32_t clamp, uint32_t lanes, const char* where) {
  check_lanes(lanes, where);
  check(clamp == kWarpSize - 1, "a part of a warp shuffles", where);
  return __shfl_xor_sync(lanes, value, static_cast<int>(lane_mask));
}

uint32_t shfl_sync_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t lanes, const char* where) {
  check_lanes(lanes, where);
  check(clamp == kWarpSize - 1, "a part of a warp shuffles", where);
  return bit_cast<uint32_t>(__shfl_sync(lanes, bit_cast<float>(value), static_cast<int>(lane)));
}

bool vote_sync_any(bool value, uint32_t lanes, const char* where) {
  check_lanes(lanes, where);
  return __any_sync(lanes, value);
}

uint32_t atom_add(uint64_t address, uint32_t value, const char* where) {
  check(address % 4 == 0, "misaligned", where);
  view().meet(thread_in_view(), address);
  return atomicAdd(reinterpret_cast<int*>(address), static_cast<int>(value));
}

void cp_async_16(uint32_t to, uint64_t from, uint32_t num_bytes, const char* where) {
  check(num_bytes == 0 || num_bytes == 16, "a part of a chunk is copied", where);
  check(from % 16 == 0, "misaligned", where);
  copy_async_16(shared(to, 16, where), reinterpret_cast<const char*>(from), num_bytes == 16);
}

void cp_async_commit_group() { commit_copies(); }

void cp_async_wait_group(int groups_left) { emulation::wait_for_groups(groups_left); }

// Lanes must be at the same instruction of the kernel, not only at the same kind of one.
template <bool kTransposed>
void ldmatrix(uint32_t (&registers)[4], uint32_t row, const char* where) {
  const char* address = shared(row, 16, where);
  const auto loaded =
      emulation::collective<emulation::Registers4>(where, address, emulation::compute_ldmatrix<kTransposed>);
  std::memcpy(registers, loaded.values, sizeof(registers));
}

template void ldmatrix<false>(uint32_t (&)[4], uint32_t, const char*);
template void ldmatrix<true>(uint32_t (&)[4], uint32_t, const char*);

template <typename Element>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* where) {
  const emulation::MmaOperands operands{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto result = emulation::collective<emulation::MmaResult>(where, operands, emulation::compute_mma<Element>);
  std::memcpy(c, result.c, sizeof(c));
}

template void mma<BFloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], const char*);
template void mma<Float16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], const char*);

}  // namespace ptx
