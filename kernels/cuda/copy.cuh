// Copies slots from block to block, in every layer.
#pragma once

#include "variant.cuh"

// The first num_tokens slots of block src are copied to block dst.
struct BlockCopyItem {
  int32_t src, dst, num_tokens;
};

struct BlockCopyArgs {
  // [num_planes, num_blocks, num_kv_heads, block_size, head_dim]; a plane is one layer's keys, or its values.
  void* pool;
  const BlockCopyItem* copies;  // none writes what another one reads or writes
  cudaStream_t stream;
  int64_t num_blocks;
  int32_t num_copies, num_planes, num_kv_heads;
};

constexpr int kCopyThreads = 128;

// Grid: [num_copies, num_planes].
__global__ void __launch_bounds__(kCopyThreads) copy_blocks_kernel(BlockCopyArgs args) {
  const BlockCopyItem copy = args.copies[blockIdx.x];
  const int64_t block_chunks = static_cast<int64_t>(args.num_kv_heads) * kBlockSize * kRowChunks;
  uint4* plane = static_cast<uint4*>(args.pool) + blockIdx.y * args.num_blocks * block_chunks;
  const int head_chunks = copy.num_tokens * kRowChunks;
  for (int i = threadIdx.x; i < args.num_kv_heads * head_chunks; i += kCopyThreads) {
    const int64_t within = static_cast<int64_t>(i / head_chunks) * kBlockSize * kRowChunks + i % head_chunks;
    plane[copy.dst * block_chunks + within] = plane[copy.src * block_chunks + within];
  }
}
