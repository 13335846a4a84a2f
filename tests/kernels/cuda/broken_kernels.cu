// Kernels that are wrong, each in a way that the emulation must name; and one that is right.
#include "kernels/cuda/variant.cuh"

struct Args {
  const float* source;  // [64, 4]
  float* out;           // [64]
};

__device__ char* tile() { return dynamic_shared_memory(); }

__device__ void start_copy(const Args& args) {
  copy_async_16(tile() + 16 * threadIdx.x, args.source + 4 * threadIdx.x, true);
}

// Each thread's first float, through its neighbour's chunk.
__device__ void read_neighbour(const Args& args) {
  const unsigned neighbour = threadIdx.x ^ 1;
  args.out[threadIdx.x] = reinterpret_cast<float*>(tile())[4 * neighbour];
}

__global__ void right(Args args) {
  start_copy(args);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  read_neighbour(args);
}

__global__ void no_wait(Args args) {
  start_copy(args);
  commit_copies();
  __syncwarp();
  read_neighbour(args);
  wait_for_copies<0>();
}

__global__ void waits_for_too_few(Args args) {
  start_copy(args);
  commit_copies();
  wait_for_copies<1>();
  __syncwarp();
  read_neighbour(args);
  wait_for_copies<0>();
}

__global__ void no_barrier_after_wait(Args args) {
  start_copy(args);
  commit_copies();
  wait_for_copies<0>();
  read_neighbour(args);
}

__global__ void ends_before_copies(Args args) {
  start_copy(args);
  commit_copies();
}

__global__ void no_commit(Args args) { start_copy(args); }

__global__ void diverges(Args args) {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    args.out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 2);
  }
}

__global__ void half_a_warp_shuffles(Args args) {
  if (threadIdx.x % 32 < 16) args.out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 2);
}

__global__ void half_the_block_waits(Args) {
  if (threadIdx.x < 32) __syncthreads();
}

// The second warp reads what the first has written, or not yet.
__global__ void no_barrier_between_warps(Args args) {
  float* shared = reinterpret_cast<float*>(tile());
  shared[threadIdx.x] = 1.0f;
  args.out[threadIdx.x] = shared[threadIdx.x ^ 32];
}

__global__ void rows_in_the_same_banks(Args args) {
  uint32_t registers[4];
  load_matrices<false>(registers, tile() + 128 * (threadIdx.x % 8));
  args.out[threadIdx.x] = registers[0];
}

__global__ void out_of_shared_memory(Args args) { args.out[0] = reinterpret_cast<float*>(tile())[64 * 4]; }

extern "C" int run(const char* name, const Args* args) {
  const struct {
    const char* name;
    void (*kernel)(Args);
  } kernels[] = {{"right", right},
                 {"no_wait", no_wait},
                 {"waits_for_too_few", waits_for_too_few},
                 {"no_barrier_after_wait", no_barrier_after_wait},
                 {"ends_before_copies", ends_before_copies},
                 {"no_commit", no_commit},
                 {"diverges", diverges},
                 {"half_a_warp_shuffles", half_a_warp_shuffles},
                 {"half_the_block_waits", half_the_block_waits},
                 {"no_barrier_between_warps", no_barrier_between_warps},
                 {"rows_in_the_same_banks", rows_in_the_same_banks},
                 {"out_of_shared_memory", out_of_shared_memory}};
  for (const auto& entry : kernels) {
    if (std::strcmp(entry.name, name) == 0) return launch(entry.kernel, dim3(1), 64, 64 * 16, nullptr, *args);
  }
  return -1;
}

extern "C" const char* message() { return emulation::last_failure.c_str(); }

extern "C" void seed(uint64_t value) { emulation::seed = value; }
