// Vectors of floats and of words: what differs between instruction sets.
//
// The lane count follows the compiler's target and arithmetic is the compiler's vector extension, so the rest of the
// code is written once.
#pragma once

#include <cstdint>
#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace pagoda {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kAlignment = 64;  // bytes
constexpr float kLog2E = 1.44269504f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Floats = VectorOf<float>::type;
using Words = VectorOf<uint32_t>::type;
using Halves = VectorOf<uint16_t>::type;

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats select(VectorOf<int32_t>::type mask, Floats yes, Floats no) { return mask ? yes : no; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// --- Across lanes.

// Picks lane lane_of(i) of a and b side by side.
template <class LaneOf, int... i>
inline Floats shuffle(Floats a, Floats b, LaneOf, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, LaneOf::at(i)...);
}

template <class LaneOf>
inline Floats shuffle(Floats a, Floats b) {
  return shuffle(a, b, LaneOf{}, std::make_integer_sequence<int, kLanes>{});
}

template <int distance>
struct RotatedLane {
  static constexpr int at(int i) { return (i + distance) % kLanes; }
};

// All lanes combined into one, in a fixed order: halves first.
template <int distance = kLanes / 2, class Combine>
inline float combine(Floats x, Combine two) {
  if constexpr (distance == 0) {
    return x[0];
  } else {
    return combine<distance / 2>(two(x, shuffle<RotatedLane<distance>>(x, x)), two);
  }
}

inline float largest(Floats x) {
  return combine(x, [](Floats a, Floats b) { return max(a, b); });
}

inline float sum(Floats x) {
  return combine(x, [](Floats a, Floats b) { return a + b; });
}

template <bool upper>
struct InterleavedLane {
  static constexpr int at(int i) { return i / 2 + (upper ? kLanes / 2 : 0) + (i % 2 ? kLanes : 0); }
};

// --- Powers of two, and prefetches.

// 2^x for x <= 0 (relative error 1e-7); exactly 0 below -125, so also for minus infinity. A NaN stays one.
inline Floats exp2(Floats x) {
  constexpr float kLowest = -125.0f;
  const Floats clamped = max(broadcast(kLowest), x);
  const Floats shifted = clamped + kRounder;
  const Floats f = clamped - (shifted - kRounder);
  Floats power = broadcast(1.54614449e-4f);
  power = power * f + 1.34004280e-3f;
  power = power * f + 9.61805694e-3f;
  power = power * f + 5.55032715e-2f;
  power = power * f + 2.40226507e-1f;
  power = power * f + 6.93147182e-1f;
  power = power * f + 1.0f;
  const Words exponents = reinterpret_cast<Words>(shifted) << 23;
  return select(x < kLowest, Floats{}, reinterpret_cast<Floats>(reinterpret_cast<Words>(power) + exponents));
}

// The same for what is rounded to bfloat16 (relative error 1e-4).
inline Floats exp2_rough(Floats x) {
#if defined(__AVX512DQ__)
  constexpr int kFloor = 0x09;
  const Floats f = _mm512_reduce_ps(x, kFloor);
  Floats power = broadcast(7.80245215e-2f);
  power = power * f + 2.26067171e-1f;
  power = power * f + 6.95833504e-1f;
  power = power * f + 9.99925196e-1f;
  return _mm512_scalef_ps(power, x);
#else
  return exp2(x);
#endif
}

// Without the empty statement, which is never optimized, GCC takes who prefetches and does nothing else for a function
// without effects, and drops the calls.
inline void prefetch(const void* address) {
  __builtin_prefetch(address);
  asm volatile("");
}
inline void prefetch_far(const void* address) {  // to the L2 cache
  __builtin_prefetch(address, 0, 2);
  asm volatile("");
}

}  // namespace pagoda
