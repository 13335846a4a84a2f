// Writes keys and values into the slots of the step's tokens, and copies slots from block to block.
#pragma once

#include "layout.cuh"

struct KvWriteArgs {
  const void* key;    // [num_tokens, num_kv_heads, head_dim]; tokens are key_stride elements apart
  const void* value;  // the same shape; tokens are value_stride elements apart
  void* keys;         // [num_blocks, num_kv_heads, block_size, head_dim], as values
  void* values;
  const int64_t* slot_mapping;  // [num_tokens]: block_id * block_size + offset
  cudaStream_t stream;
  int64_t key_stride, value_stride;
  int32_t num_tokens, num_kv_heads;
};

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

constexpr int kKvWriteThreads = 128;

// Chunk `chunk` of the slot `slot` of a head, in chunks of 16 bytes.
__device__ __forceinline__ int64_t slot_chunk(int64_t slot, int num_kv_heads, int kv_head, int chunk) {
  const int64_t block = slot / kBlockSize, offset = slot % kBlockSize;
  return ((block * num_kv_heads + kv_head) * kBlockSize + offset) * kRowChunks + chunk;
}

// Grid: [num_tokens].
__global__ void __launch_bounds__(kKvWriteThreads) write_kv_kernel(KvWriteArgs args) {
  const int token = blockIdx.x;
  const int64_t slot = args.slot_mapping[token];
  const Element* key = static_cast<const Element*>(args.key) + token * args.key_stride;
  const Element* value = static_cast<const Element*>(args.value) + token * args.value_stride;
  for (int i = threadIdx.x; i < args.num_kv_heads * kRowChunks; i += kKvWriteThreads) {
    const int64_t to = slot_chunk(slot, args.num_kv_heads, i / kRowChunks, i % kRowChunks);
    static_cast<uint4*>(args.keys)[to] = reinterpret_cast<const uint4*>(key)[i];
    static_cast<uint4*>(args.values)[to] = reinterpret_cast<const uint4*>(value)[i];
  }
}

// Grid: [num_copies, num_planes].
__global__ void __launch_bounds__(kKvWriteThreads) copy_blocks_kernel(BlockCopyArgs args) {
  const BlockCopyItem copy = args.copies[blockIdx.x];
  const int64_t block_chunks = static_cast<int64_t>(args.num_kv_heads) * kBlockSize * kRowChunks;
  uint4* plane = static_cast<uint4*>(args.pool) + blockIdx.y * args.num_blocks * block_chunks;
  const int head_chunks = copy.num_tokens * kRowChunks;
  for (int i = threadIdx.x; i < args.num_kv_heads * head_chunks; i += kKvWriteThreads) {
    const int64_t within = static_cast<int64_t>(i / head_chunks) * kBlockSize * kRowChunks + i % head_chunks;
    plane[copy.dst * block_chunks + within] = plane[copy.src * block_chunks + within];
  }
}
