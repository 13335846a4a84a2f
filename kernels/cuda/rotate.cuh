// Between a layer's projection and its attention, in one pass: norms on heads, rotary embedding, KV write.
#pragma once

#include "layout.cuh"
#include "rows.cuh"

struct RotateArgs {
  const void* heads;  // [num_tokens, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values
  const void* cos;    // [num_tokens, head_dim / 2], as sin
  const void* sin;
  const void* query_norm;  // [head_dim], as key_norm; null: no norm
  const void* key_norm;
  void* query;  // [num_tokens, num_heads, head_dim], contiguous
  void* keys;   // [num_blocks, num_kv_heads, kHeadBytes], as values
  void* values;
  const int64_t* slot_mapping;  // [num_tokens]: block_id * block_size + offset
  cudaStream_t stream;
  int64_t heads_stride;  // elements from token to token
  int32_t num_tokens, num_heads, num_kv_heads;
  float norm_epsilon;
};

constexpr int kRotateWarps = 4;
constexpr int kRotateThreads = kRotateWarps * kWarpThreads;
constexpr int kPairs = kHeadDim / 2;  // dimension i is turned with dimension i + kPairs
constexpr int kLanePairs = (kPairs + kWarpThreads - 1) / kWarpThreads;

// One head in the registers of a warp: lane l holds pairs l, l + 32 ...; 0 past the last.
struct HeadPairs {
  float first[kLanePairs], second[kLanePairs];

  __device__ __forceinline__ static int index(int i) { return threadIdx.x % kWarpThreads + i * kWarpThreads; }

  __device__ __forceinline__ explicit HeadPairs(const Element* head) {
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      first[i] = index(i) < kPairs ? to_float(head[index(i)]) : 0.0f;
      second[i] = index(i) < kPairs ? to_float(head[kPairs + index(i)]) : 0.0f;
    }
  }

  // Root mean square norm.
  __device__ __forceinline__ void normalize(const Element* weight, float epsilon) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) squares += first[i] * first[i] + second[i] * second[i];
    const float scale = 1.0f / sqrtf(warp_sum(squares) / kHeadDim + epsilon);
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      if (index(i) >= kPairs) continue;
      first[i] *= scale * to_float(weight[index(i)]);
      second[i] *= scale * to_float(weight[kPairs + index(i)]);
    }
  }

  // cos, sin: [kPairs].
  __device__ __forceinline__ void rotate(const Element* cos, const Element* sin) {
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      if (index(i) >= kPairs) continue;
      const float c = to_float(cos[index(i)]), s = to_float(sin[index(i)]);
      const float turned = first[i] * c - second[i] * s;
      second[i] = second[i] * c + first[i] * s;
      first[i] = turned;
    }
  }

  // The largest of all magnitudes; not a number where one is not. As bits, magnitudes have the order of integers.
  __device__ __forceinline__ float largest() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) bits = max(bits, max(bits_of(fabsf(first[i])), bits_of(fabsf(second[i]))));
    return float_of(warp_max(bits));
  }

  // convert: from float to E.
  template <typename E, typename Convert>
  __device__ __forceinline__ void store(E* head, Convert convert) const {
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      if (index(i) >= kPairs) continue;
      head[index(i)] = convert(first[i]);
      head[kPairs + index(i)] = convert(second[i]);
    }
  }
};

// Writes elements, and their scale; `offset` is the slot's in its block. A template only so that variants without
// scales need not compile it.
template <typename K>
__device__ __forceinline__ void store_scaled(const HeadPairs& pairs, K* elements, int offset) {
  const float scale = pairs.largest() / kLargest<K>;
  pairs.store(elements, [=](float x) { return quantize<K>(x, scale); });
  char* to = reinterpret_cast<char*>(elements) + scale_distance(offset);
  if (threadIdx.x % kWarpThreads == 0) *reinterpret_cast<float*>(to) = scale;
}

// Grid: [num_tokens, any]; a warp for each head.
__global__ void __launch_bounds__(kRotateThreads) rotate_kernel(RotateArgs args) {
  const int64_t token = blockIdx.x, slot = args.slot_mapping[token];
  const Element* heads = static_cast<const Element*>(args.heads) + token * args.heads_stride;
  const Element* cos = static_cast<const Element*>(args.cos) + token * kPairs;
  const Element* sin = static_cast<const Element*>(args.sin) + token * kPairs;
  const int num_turned = args.num_heads + args.num_kv_heads;
  const int head = blockIdx.y * kRotateWarps + threadIdx.x / kWarpThreads;
  if (head >= num_turned + args.num_kv_heads) return;
  const bool is_query = head < args.num_heads, is_value = head >= num_turned;
  HeadPairs pairs(heads + static_cast<int64_t>(head) * kHeadDim);
  const void* norm = is_query ? args.query_norm : args.key_norm;
  if (norm && !is_value) pairs.normalize(static_cast<const Element*>(norm), args.norm_epsilon);
  if (!is_value) pairs.rotate(cos, sin);
  if (is_query) {
    Element* query = static_cast<Element*>(args.query) + (token * args.num_heads + head) * kHeadDim;
    pairs.store(query, from_float<Element>);
  } else {
    const int kv_head = is_value ? head - num_turned : head - args.num_heads;
    const int offset = slot % kBlockSize;
    KV* to = static_cast<KV*>(is_value ? args.values : args.keys) +
             pool_offset(slot / kBlockSize, offset, args.num_kv_heads, kv_head);
    if constexpr (kIsScaled) {
      store_scaled<KV>(pairs, to, offset);
    } else {
      pairs.store(to, from_float<KV>);
    }
  }
}
