// Between a layer's projection and its attention, in one pass: norms on heads, rotary embedding, KV write.
#include "../base/rows.h"
#include "../base/team.h"
#include "attention.h"
#include "slots.h"

namespace pagoda {
namespace {

constexpr int kFewTokens = 16;  // fewer are not worth waking other threads

class Rotation {
 public:
  Rotation(const Shape& shape, const RotateCall& call)
      : shape_(shape), call_(call), half_(shape.head_dim / 2), layout_{shape.block_size, shape.head_dim} {}

  void run() const {
    for_many(call_.num_threads, call_.num_tokens, kFewTokens, [this](int64_t token) {
      alignas(kAlignment) float row[kMaxHeadDim];
      Element* head = static_cast<Element*>(call_.heads) + token * call_.heads_stride;
      for (int i = 0; i < shape_.num_heads; ++i, head += shape_.head_dim) turn(token, head, call_.query_norm, head);
      const int64_t block = call_.slot_mapping[token] / shape_.block_size * shape_.num_kv_heads;
      const int offset = call_.slot_mapping[token] % shape_.block_size;
      for (int i = 0; i < shape_.num_kv_heads; ++i, head += shape_.head_dim) {
        turn(token, head, call_.key_norm, row);
        write_key(row, layout_, static_cast<char*>(call_.keys) + (block + i) * layout_.bytes(), offset);
      }
      for (int i = 0; i < shape_.num_kv_heads; ++i, head += shape_.head_dim) {
        convert(head, row, shape_.head_dim);
        write_value(row, layout_, static_cast<char*>(call_.values) + (block + i) * layout_.bytes(), offset);
      }
    });
  }

 private:
  // Dimension d with d + half_, by the token's angle. `to` may be `from`.
  template <class To>
  void turn(int64_t token, const Element* from, const void* norm, To* to) const {
    const auto* weight = static_cast<const Element*>(norm);
    const Element* cos = static_cast<const Element*>(call_.cos) + token * half_;
    const Element* sin = static_cast<const Element*>(call_.sin) + token * half_;
    const float scale = weight ? inverse_rms(from, shape_.head_dim, call_.norm_epsilon) : 1.0f;
    for_vectors(half_, [&](int d, int count) {
      Floats first = load_some(from + d, count), second = load_some(from + half_ + d, count);
      if (weight) {
        first *= scale * load_some(weight + d, count);
        second *= scale * load_some(weight + half_ + d, count);
      }
      const Floats c = load_some(cos + d, count), s = load_some(sin + d, count);
      store_some(to + d, first * c - second * s, count);
      store_some(to + half_ + d, second * c + first * s, count);
    });
  }

  const Shape& shape_;
  const RotateCall& call_;
  int half_;  // of head_dim
  HeadLayout layout_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_rotate_and_write(const pagoda::Shape* shape, const pagoda::RotateCall* call) {
  pagoda::Rotation(*shape, *call).run();
}

#pragma GCC visibility pop
