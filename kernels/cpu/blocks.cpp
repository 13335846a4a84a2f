// Moving keys and values from block to block.
#include <cstring>

#include "attention.h"

#pragma GCC visibility push(default)

// Runs copies in order: [num_copies, 3], source block, destination block, tokens. pool: [num_planes, num_blocks,
// num_kv_heads, block_size, head_dim], a plane being one layer's keys or values.
extern "C" void pagoda_copy_blocks(const pagoda::Shape* shape, void* pool, int64_t num_planes, int64_t num_blocks,
                                   const int64_t* copies, int64_t num_copies, int32_t element_bytes,
                                   int32_t num_threads) {
  const int64_t row_bytes = static_cast<int64_t>(shape->head_dim) * element_bytes;
  const int64_t head_bytes = shape->block_size * row_bytes;
  const int64_t block_bytes = shape->num_kv_heads * head_bytes;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t plane = 0; plane < num_planes; ++plane) {
    char* blocks = static_cast<char*>(pool) + plane * num_blocks * block_bytes;
    for (int64_t i = 0; i < num_copies; ++i) {
      const char* from = blocks + copies[3 * i] * block_bytes;
      char* to = blocks + copies[3 * i + 1] * block_bytes;
      for (int head = 0; head < shape->num_kv_heads; ++head) {
        std::memmove(to + head * head_bytes, from + head * head_bytes, copies[3 * i + 2] * row_bytes);
      }
    }
  }
}

#pragma GCC visibility pop
