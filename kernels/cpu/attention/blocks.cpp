// Moving keys and values from block to block.
#include "blocks.h"

#include <cstring>

#include "../base/team.h"
#include "attention.h"

namespace pagoda {
namespace {

// The first num_tokens slots of a head's part of a block.
void copy_slots(HeadLayout layout, bool is_key, const char* from, char* to, int64_t num_tokens) {
  const int64_t element_bytes = layout.elements() * sizeof(KV);
  if (is_key) {
    constexpr int64_t kSlotBytes = kKeyGroup * sizeof(KV);
    for (int64_t row = 0; row < element_bytes; row += layout.block_size * kSlotBytes) {
      std::memmove(to + row, from + row, num_tokens * kSlotBytes);
    }
  } else {
    const int64_t num_whole = num_tokens / kValueGroup * kValueGroup * layout.head_dim;
    std::memmove(to, from, num_whole * sizeof(KV));
    const KV* rest = reinterpret_cast<const KV*>(from) + num_whole;
    KV* to_rest = reinterpret_cast<KV*>(to) + num_whole;
    for (int i = 0; i < kValueGroup * layout.head_dim; ++i) {
      if (i % kValueGroup < num_tokens % kValueGroup) to_rest[i] = rest[i];
    }
  }
  if (kIsScaled) std::memmove(to + element_bytes, from + element_bytes, num_tokens * sizeof(float));
}

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

// Dimensions of a key, and tokens of a value, that lie together: see HeadLayout.
extern "C" int32_t pagoda_key_group() { return pagoda::kKeyGroup; }
extern "C" int32_t pagoda_value_group() { return pagoda::kValueGroup; }

// Runs copies in order: [num_copies, 3], source block, destination block, tokens. pool: [num_layers, 2, num_blocks,
// num_kv_heads], each a HeadLayout, keys before values.
extern "C" void pagoda_copy_blocks(const pagoda::Shape* shape, void* pool, int64_t num_layers, int64_t num_blocks,
                                   const int64_t* copies, int64_t num_copies, int32_t num_threads) {
  using namespace pagoda;
  const HeadLayout layout{shape->block_size, shape->head_dim};
  const int64_t block_bytes = shape->num_kv_heads * layout.bytes();
  for_units(num_threads, 2 * num_layers, [=](int64_t plane) {
    char* blocks = static_cast<char*>(pool) + plane * num_blocks * block_bytes;
    for (int64_t i = 0; i < num_copies; ++i) {
      const char* from = blocks + copies[3 * i] * block_bytes;
      char* to = blocks + copies[3 * i + 1] * block_bytes;
      for (int64_t head = 0; head < block_bytes; head += layout.bytes()) {
        copy_slots(layout, plane % 2 == 0, from + head, to + head, copies[3 * i + 2]);
      }
    }
  });
}

#pragma GCC visibility pop
