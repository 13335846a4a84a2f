// The 8-bit elements of a KV pool (kernels/kv_format.py): rounding to them, and what products make of them.
#pragma once

#include "element.cuh"

struct Int8 {
  int8_t value;
};

// e4m3: no infinity; what is not finite is said by the scale.
struct Float8 {
  uint8_t bits;
};

template <typename K>
constexpr float kLargest = 0.0f;
template <>
inline constexpr float kLargest<Int8> = 127.0f;
template <>
inline constexpr float kLargest<Float8> = 448.0f;

// What one unit of an unpacked element stands for: with it in the scale, a weight times its value's scale stays as far
// inside the range of 16 bits as the value itself was.
template <typename K>
constexpr float kPackedUnit = 1.0f;
template <>
inline constexpr float kPackedUnit<Int8> = 64.0f;
template <>
inline constexpr float kPackedUnit<Float8> = 256.0f;

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

__device__ __forceinline__ float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

__device__ __forceinline__ float to_float(Int8 x) { return x.value; }

// The same bits in a float are an element of another bias.
__device__ __forceinline__ float to_float(Float8 x) {
  const uint32_t sign = x.bits & 0x80, magnitude = x.bits & 0x7F;
  return float_of(sign << 24 | magnitude << 20) * 0x1p120f;
}

// To nearest, ties to even. x is at most kLargest.
template <>
__device__ __forceinline__ Int8 from_float<Int8>(float x) {
  return {static_cast<int8_t>(rintf(x))};
}

template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80, magnitude = bits_of(x) & 0x7FFFFFFF;
  // Below 2^-6 elements are 2^-9 apart, as floats from 2^14 on are.
  const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  const uint32_t normal = ((magnitude + 0x7FFFF + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return {static_cast<uint8_t>(sign | (magnitude < bits_of(0x1p-6f) ? small : normal))};
}

// The element that times `scale` comes nearest to x; 0 where either is not a number.
template <typename K>
__device__ __forceinline__ K quantize(float x, float scale) {
  constexpr float kSmallestDivisor = 0x1p-126f;
  const float scaled = x / (scale < kSmallestDivisor ? kSmallestDivisor : scale);
  return from_float<K>(scaled != scaled ? 0.0f : fminf(fmaxf(scaled, -kLargest<K>), kLargest<K>));
}

// The elements in bytes 0 and 2, over kPackedUnit, as a pair of E. Bytes 1 and 3 are ignored.
template <typename E, typename K>
__device__ __forceinline__ uint32_t widen(uint32_t packed);

// 7 bits make 128 to 255; then 128 is subtracted, or 256 where the sign is set.
template <>
__device__ __forceinline__ uint32_t widen<BFloat16, Int8>(uint32_t packed) {
  constexpr uint32_t k128 = 0x43004300, kMinus2 = 0xC000C000, k1Over64 = 0x3C803C80;
  const uint32_t magnitudes = mask_or(packed, 0x007F007F, k128), signs = mask_or(packed, 0x00800080, kMinus2);
  return multiply_add<BFloat16>(magnitudes, k1Over64, signs);
}

// An element plus 128 makes 1024 to 1279.
template <>
__device__ __forceinline__ uint32_t widen<Float16, Int8>(uint32_t packed) {
  constexpr uint32_t k1152 = 0x64806480, kMinus18 = 0xCC80CC80, k1Over64 = 0x24002400;
  return multiply_add<Float16>(mask_xor(packed, 0x00FF00FF, k1152), k1Over64, kMinus18);
}

template <>
__device__ __forceinline__ uint32_t widen<BFloat16, Float8>(uint32_t packed) {
  constexpr uint32_t k2To112 = 0x77807780, kMinus0 = 0x80008000;
  packed <<= 8;
  return multiply_add<BFloat16>((packed & 0x80008000) | (packed >> 4 & 0x07F007F0), k2To112, kMinus0);
}

// The other bias is the unit.
template <>
__device__ __forceinline__ uint32_t widen<Float16, Float8>(uint32_t packed) {
  packed <<= 8;
  return (packed & 0x80008000) | (packed >> 1 & 0x3F803F80);
}
