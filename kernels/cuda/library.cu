// The C ABI of one variant. Every call returns 0 or an error that pagoda_error describes, starts its kernels on the
// stream it is given, allocates nothing and waits for nothing.
#include "copy.cuh"
#include "gate.cuh"
#include "greedy.cuh"
#include "norm.cuh"
#include "prefill.cuh"
#include "rotate.cuh"

// What the host must know of this build.
struct Facts {
  int32_t attention_args_bytes, block_copy_args_bytes, rotate_args_bytes;
  int32_t norm_args_bytes, gate_args_bytes, greedy_args_bytes;
  int32_t decode_rows, prefill_rows;  // query rows of an item at most
  int32_t decode_blocks;              // blocks of the decode grid that the device runs at once
};

static int start_decode(const AttentionArgs& args) {
  if (args.num_units == 0) return 0;
  const dim3 grid(args.num_units, args.num_kv_heads);
  return launch(decode_kernel, grid, kDecodeThreads, kDecodeSharedBytes, args.stream, args);
}

static int start_prefill(const AttentionArgs& args) {
  if (args.num_prefill_items == 0) return 0;
  const dim3 grid(args.num_prefill_items, args.num_kv_heads);
  return launch(prefill_kernel, grid, kPrefillThreads, kPrefillSharedBytes, args.stream, args);
}

#if defined(__CUDACC__)

// Lets kernels use more shared memory than the default, and counts the decode blocks that fit on the device.
static int open_device(Facts& facts) {
  int device = 0, num_processors = 0, blocks_per_processor = 0;
  const auto set_shared = [](auto kernel, int bytes) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    // All that there is to shared memory: the driver might leave room for one block where two fit.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  };
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = set_shared(decode_kernel, kDecodeSharedBytes);
  if (status == cudaSuccess) status = set_shared(prefill_kernel, kPrefillSharedBytes);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_processor, decode_kernel, kDecodeThreads,
                                                           kDecodeSharedBytes);
  }
  facts.decode_blocks = num_processors * blocks_per_processor;
  return static_cast<int>(status);
}

#else

static int open_device(Facts& facts) {
  facts.decode_blocks = 4;
  return 0;
}

#endif

extern "C" {

// Once per process and device, before the first call there; the device must be the current one.
int pagoda_open(Facts* facts) {
  facts->attention_args_bytes = sizeof(AttentionArgs);
  facts->block_copy_args_bytes = sizeof(BlockCopyArgs);
  facts->rotate_args_bytes = sizeof(RotateArgs);
  facts->norm_args_bytes = sizeof(NormArgs);
  facts->gate_args_bytes = sizeof(GateArgs);
  facts->greedy_args_bytes = sizeof(GreedyArgs);
  facts->decode_rows = kTileRows;
  facts->prefill_rows = kPrefillRows;
  return open_device(*facts);
}

int pagoda_attend(const AttentionArgs* args) {
  const int status = start_decode(*args);
  return status ? status : start_prefill(*args);
}

int pagoda_rotate(const RotateArgs* args) {
  if (args->num_tokens == 0) return 0;
  const int num_heads = args->num_heads + 2 * args->num_kv_heads;
  const dim3 grid(args->num_tokens, (num_heads + kRotateWarps - 1) / kRotateWarps);
  return launch(rotate_kernel, grid, kRotateThreads, 0, args->stream, *args);
}

int pagoda_norm(const NormArgs* args) {
  if (args->num_rows == 0) return 0;
  const auto kernel = args->size % kChunkElements ? norm_kernel<1> : norm_kernel<kChunkElements>;
  return launch(kernel, dim3(args->num_rows), kRowThreads, kRowSharedBytes, args->stream, *args);
}

int pagoda_gate(const GateArgs* args) {
  if (args->num_rows == 0) return 0;
  const bool is_chunked = args->size % kChunkElements == 0;
  const int num_chunks = is_chunked ? args->size / kChunkElements : args->size;
  const dim3 grid(args->num_rows, (num_chunks + kRowThreads - 1) / kRowThreads);
  return launch(is_chunked ? gate_kernel<kChunkElements> : gate_kernel<1>, grid, kRowThreads, 0, args->stream, *args);
}

int pagoda_greedy(const GreedyArgs* args) {
  if (args->num_rows == 0) return 0;
  const auto kernel = args->vocab_size % 4 ? greedy_kernel<1> : greedy_kernel<4>;
  return launch(kernel, dim3(args->num_rows), kGreedyThreads, kGreedySharedBytes, args->stream, *args);
}

int pagoda_copy_blocks(const BlockCopyArgs* args) {
  if (args->num_copies == 0) return 0;
  const dim3 grid(args->num_copies, args->num_planes);
  return launch(copy_blocks_kernel, grid, kCopyThreads, 0, args->stream, *args);
}

#if defined(__CUDACC__)

const char* pagoda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

#else

const char* pagoda_error(int) { return emulation::last_failure.c_str(); }

// The order of threads and blocks from now on; 0 is their natural one.
void pagoda_emulation_seed(uint64_t seed) { emulation::seed = seed; }

#endif
}
