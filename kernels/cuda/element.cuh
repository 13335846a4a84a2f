// The element types of queries, keys and values, and their conversion to and from float32.
#pragma once

#include <cstdint>
#include <cstring>

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename Element>
__device__ __forceinline__ Element from_float(float x);

// Two elements in one register, `low` in its lower half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

// a * b + c of two elements, each rounded once.
template <typename Element>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c);

__device__ __forceinline__ float to_float(float x) { return x; }

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

#if defined(__CUDACC__)

__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ __forceinline__ float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The same pointer, of which the compiler knows nothing: what is a constant away from it is addressed so, rather than
// by a sum of its own.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// (word & mask) | bits, and (word & mask) ^ bits: one instruction, of which the compiler makes two where both are
// constants.
__device__ __forceinline__ uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

__device__ __forceinline__ uint32_t mask_xor(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

template <>
__device__ __forceinline__ uint32_t multiply_add<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

template <>
__device__ __forceinline__ uint32_t multiply_add<Float16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

#else

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

inline float to_float(Float16 x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof(y));
  return static_cast<float>(y);
}

template <typename T>
const T* opaque(const T* pointer) {
  return pointer;
}

inline uint32_t mask_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t mask_xor(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) ^ bits; }

// To nearest, ties to even; a NaN stays one.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return {0x7FFF};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  Float16 result;
  std::memcpy(&result, &y, sizeof(result));
  return result;
}

template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
}

template <>
inline uint32_t pack<Float16>(float low, float high) {
  return from_float<Float16>(low).bits | static_cast<uint32_t>(from_float<Float16>(high).bits) << 16;
}

// One half of a register.
template <typename Element>
float half_of_register(uint32_t packed, int index) {
  Element element;
  element.bits = static_cast<uint16_t>(index ? packed >> 16 : packed);
  return to_float(element);
}

// A product of 16-bit elements is exact in a float; so is every sum that the kernels make here.
template <typename Element>
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  float sums[2];
  for (int i = 0; i < 2; ++i) {
    sums[i] = half_of_register<Element>(a, i) * half_of_register<Element>(b, i) + half_of_register<Element>(c, i);
  }
  return pack<Element>(sums[0], sums[1]);
}

#endif
