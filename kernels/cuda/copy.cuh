// Copies slots from block to block, in every layer.
#pragma once

#include "variant.cuh"

// The first num_tokens slots of block src are copied to block dst.
struct BlockCopyItem {
  int32_t src, dst, num_tokens;
};

struct BlockCopyArgs {
  // [num_planes, num_blocks, num_kv_heads, kHeadBytes]; a plane is one layer's keys, or its values.
  void* pool;
  const BlockCopyItem* copies;  // none writes what another one reads or writes
  cudaStream_t stream;
  int64_t num_blocks;
  int32_t num_copies, num_planes, num_kv_heads;
};

constexpr int kCopyThreads = 128;

// The first num_words of each head's part of a block.
template <typename Word>
__device__ __forceinline__ void copy_of_heads(const char* from, char* to, int num_kv_heads, int num_words) {
  for (int i = threadIdx.x; i < num_kv_heads * num_words; i += kCopyThreads) {
    const int64_t head = static_cast<int64_t>(i / num_words) * kHeadBytes;
    reinterpret_cast<Word*>(to + head)[i % num_words] = reinterpret_cast<const Word*>(from + head)[i % num_words];
  }
}

// Grid: [num_copies, num_planes].
__global__ void __launch_bounds__(kCopyThreads) copy_blocks_kernel(BlockCopyArgs args) {
  const BlockCopyItem copy = args.copies[blockIdx.x];
  const int64_t block_bytes = static_cast<int64_t>(args.num_kv_heads) * kHeadBytes;
  char* plane = static_cast<char*>(args.pool) + blockIdx.y * args.num_blocks * block_bytes;
  const char* from = plane + copy.src * block_bytes;
  char* to = plane + copy.dst * block_bytes;
  copy_of_heads<uint4>(from, to, args.num_kv_heads, copy.num_tokens * kKVRowChunks);
  if constexpr (kIsScaled) {
    copy_of_heads<float>(from + kElementBytes, to + kElementBytes, args.num_kv_heads, copy.num_tokens);
  }
}
