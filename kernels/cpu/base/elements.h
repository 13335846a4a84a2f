// The element types that memory holds, as vectors of floats: loads, stores, and products of those that units multiply.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace pagoda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Int8 {
  int8_t bits;
};
// e4m3: loads give kUnit times less, for that is the exponent's bias in a float16.
struct Float8 {
  uint8_t bits;
};

// What one library is compiled for: the type of weights and activations, and that of the KV pool.
using Element = PAGODA_ELEMENT;
using KV = PAGODA_KV;

// --- Loads: kLanes elements, as floats.

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline Floats from_float16(Halves bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
  Floats x;
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t one = bits[i];
    _Float16 half;
    std::memcpy(&half, &one, sizeof half);
    x[i] = half;
  }
  return x;
#endif
}

inline Floats load(const Float16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return from_float16(halves);
}

inline Floats load(const Int8* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from)));
#else
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = from[i].bits;
  return x;
#endif
}

inline Floats load(const Float8* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const auto extended = reinterpret_cast<Halves>(_mm256_cvtepi8_epi16(bytes));
#elif defined(__AVX2__)
  const auto extended = reinterpret_cast<Halves>(_mm_cvtepi8_epi16(_mm_loadu_si64(from)));
#else
  Halves extended;
  for (int i = 0; i < kLanes; ++i) extended[i] = static_cast<int8_t>(from[i].bits);
#endif
  return from_float16((extended << 7) & 0xbfff);  // the sign had spread over the exponent's highest bit
}

// Half of the lanes from `first`, half from `second`.
inline Floats load_two(const float* first, const float* second) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(first));
  return _mm512_insertf32x8(low, _mm256_loadu_ps(second), 1);
#else
  Floats x;
  std::memcpy(&x, first, sizeof x / 2);
  std::memcpy(reinterpret_cast<float*>(&x) + kLanes / 2, second, sizeof x / 2);
  return x;
#endif
}

// The first `count` of kLanes elements, then zeros; reads no others.
template <class Element>
inline Floats load_first(const Element* from, int count) {
  Element padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(Element));
  return load(padded);
}

// --- Stores: kLanes floats, rounded to the nearest element.

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Bits of x, its upper half rounded to the nearest bfloat16; a NaN stays one.
inline Words rounded_bits(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words quiet_nan = Words{} + 0x7fc00000;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : quiet_nan;
}

inline void store(BFloat16* to, Floats x) {
#if defined(__AVX512BF16__)  // numbers below 2^-126 become 0
  const auto halves = _mm512_cvtneps_pbh(x);
#else
  const Halves halves = __builtin_convertvector(rounded_bits(x) >> 16, Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// x: not negative; rounded to bfloat16, halves up.
inline Floats rounded_up(Floats x) {
  return reinterpret_cast<Floats>((reinterpret_cast<Words>(x) + 0x8000) & 0xffff0000);
}

// x: rounded to bfloat16.
inline void store_rounded(float* to, Floats x) { store(to, x); }
inline void store_rounded(BFloat16* to, Floats x) {
  const Halves halves = __builtin_convertvector(reinterpret_cast<Words>(x) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline void store(Float16* to, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 half = static_cast<_Float16>(x[i]);
    std::memcpy(to + i, &half, sizeof half);
  }
#endif
}

// x: at most 127 in size.
inline void store(Int8* to, Floats x) {
  const auto bytes = __builtin_convertvector(reinterpret_cast<Words>(x + kRounder), VectorOf<uint8_t>::type);
  std::memcpy(to, &bytes, sizeof bytes);
}

// x: at most 448 in size.
inline void store(Float8* to, Floats x) {
  constexpr float kSubnormalRounder = 0x1p14f;  // its lowest bit is that of the subnormals, 2^-9
  constexpr float kSmallestNormal = 0x1p-6f;
  constexpr uint32_t kRebias = (127 - 7) << 3;
  const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffff;
  const Floats size = reinterpret_cast<Floats>(magnitude);
  const Words normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - kRebias;
  const Words zero = reinterpret_cast<Words>(broadcast(kSubnormalRounder));
  const Words subnormal = reinterpret_cast<Words>(size + kSubnormalRounder) - zero;
  const Words rounded = (size < kSmallestNormal ? subnormal : normal) | ((bits >> 24) & 0x80);
  const auto bytes = __builtin_convertvector(rounded, VectorOf<uint8_t>::type);
  std::memcpy(to, &bytes, sizeof bytes);
}

template <class Element>
inline void store_first(Element* to, Floats x, int count) {
  Element padded[kLanes];
  store(padded, x);
  std::memcpy(to, padded, count * sizeof(Element));
}

// --- Pairs: 2 * kLanes elements in whatever order is fastest to unpack. Every tensor of one element type has the same
// order, so products and sums over pairs need not know it. bfloat16 has even elements in `first`, odd ones in `second`;
// all others have the first half in `first`.

constexpr int kPair = 2 * kLanes;

struct FloatPair {
  Floats first, second;
};

inline FloatPair operator*(FloatPair x, float factor) { return {x.first * factor, x.second * factor}; }

template <class Element>
inline FloatPair load_pair(const Element* from) {
  return {load(from), load(from + kLanes)};
}

inline FloatPair unpack(Words bfloat16s) {
  return {reinterpret_cast<Floats>(bfloat16s << 16), reinterpret_cast<Floats>(bfloat16s & 0xffff0000)};
}

// Into a register: unpacked, GCC would load it twice.
inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
#ifdef __x86_64__
  asm("" : "+v"(words));
#endif
  return words;
}

inline FloatPair load_pair(const BFloat16* from) { return unpack(load_words(from)); }

// The word at `from`, in every lane.
inline Words broadcast_words(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word - Words{};
}

// sums + a * b over the two bfloat16s of each word.
inline Floats add_dot(Floats sums, Words a, Words b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const FloatPair x = unpack(a), y = unpack(b);
  return sums + x.second * y.second + x.first * y.first;
#endif
}

// sums + a * b over the four bytes of each word: those of a have no sign, those of b have one.
inline Words add_quads(Words sums, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Words>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  for (int shift = 0; shift < 32; shift += 8) {
    const auto y = reinterpret_cast<VectorOf<int32_t>::type>(b << (24 - shift)) >> 24;
    sums += (a >> shift & 0xff) * reinterpret_cast<Words>(y);
  }
  return sums;
#endif
}

// The first `count` of kPair elements, then zeros; reads no others.
template <class Element>
inline FloatPair load_pair_first(const Element* from, int count) {
  Element padded[kPair] = {};
  std::memcpy(padded, from, count * sizeof(Element));
  return load_pair(padded);
}

#if defined(__AVX512BW__)
inline FloatPair load_pair_first(const float* from, int count) {
  const __mmask16 first = (1u << std::min(count, 16)) - 1, second = (1u << std::max(count - 16, 0)) - 1;
  return {_mm512_maskz_loadu_ps(first, from), _mm512_maskz_loadu_ps(second, from + kLanes)};
}

inline FloatPair load_pair_first(const BFloat16* from, int count) {
  return unpack(reinterpret_cast<Words>(_mm512_maskz_loadu_epi16((1ull << count) - 1, from)));
}
#endif

inline void store_pair(float* to, FloatPair x) {
  store(to, x.first);
  store(to + kLanes, x.second);
}

// A pair of Element's order, in the order of elements.
template <class Element>
inline FloatPair to_order(FloatPair x) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return {shuffle<InterleavedLane<false>>(x.first, x.second), shuffle<InterleavedLane<true>>(x.first, x.second)};
  } else {
    return x;
  }
}

}  // namespace pagoda
