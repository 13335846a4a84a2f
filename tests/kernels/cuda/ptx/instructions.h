// What PTX instructions do to one emulated thread, by the PTX ISA. A function has its instruction's name, points turned
// into underscores, and the instruction's types as arguments: mul.wide.s32 is mul_wide<s32>.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cuda/emulation/qualifiers.h"

#include "kernels/cuda/element.cuh"

namespace ptx {

using pred = bool;
using u8 = uint8_t;
using s8 = int8_t;
using b16 = uint16_t;
using u16 = uint16_t;
using s16 = int16_t;
using b32 = uint32_t;
using u32 = uint32_t;
using s32 = int32_t;
using b64 = uint64_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f16 = Float16;
using bf16 = BFloat16;

// Two elements in a register.
template <typename Element>
struct Pair {
  uint32_t bits;
};
using f16x2 = Pair<Float16>;
using bf16x2 = Pair<BFloat16>;

// A kernel's parameters. So many bytes are passed on the stack, whatever they are.
template <int kBytes>
struct alignas(8) Parameters {
  static_assert(kBytes > 16);
  char bytes[kBytes];
};

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To>);
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A register read as `To`, or written with `from`: its bits, or an integer that is narrowed or extended.
template <typename To, typename From>
To as(From from) {
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
    return static_cast<To>(from);
  } else {
    return bit_cast<To>(from);
  }
}

template <typename Register, typename From>
void set(Register& to, From from) {
  to = as<Register>(from);
}

// What a register holds that nothing was written to.
template <typename Register>
Register unset() {
  if constexpr (std::is_floating_point_v<Register>) {
    return std::numeric_limits<Register>::quiet_NaN();
  } else {
    return static_cast<Register>(0xBAD0BAD0BAD0BAD0);
  }
}

// What needs other threads, or memory that has rules of its own: machine.cpp. `where`: the instruction's line.

constexpr uint32_t kSharedBase = 1024;  // where dynamic shared memory begins

// The bytes at a shared address. All of these end the block where bytes do not lie in shared memory, or not at a
// multiple of num_bytes.
char* shared(uint32_t address, int num_bytes, const char* where);
void load_global(char* to, uint64_t address, int num_bytes, const char* where);
void store_global(const char* from, uint64_t address, int num_bytes, const char* where);
void membar_gl();

uint32_t thread_index();
uint32_t block_index(int axis);
void bar_sync(const char* where);
void bar_warp_sync(uint32_t lanes, const char* where);
uint32_t shfl_sync_bfly(uint32_t value, uint32_t lane_mask, uint32_t clamp, uint32_t lanes, const char* where);
uint32_t shfl_sync_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t lanes, const char* where);
bool vote_sync_any(bool value, uint32_t lanes, const char* where);
uint32_t atom_add(uint64_t address, uint32_t value, const char* where);
void cp_async_16(uint32_t to, uint64_t from, uint32_t num_bytes, const char* where);
void cp_async_commit_group();
void cp_async_wait_group(int groups_left);
template <bool kTransposed>
void ldmatrix(uint32_t (&registers)[4], uint32_t row, const char* where);
template <typename Element>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* where);

template <typename T>
T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void store(char* to, T value) {
  std::memcpy(to, &value, sizeof(value));
}

// Integers wrap (-fwrapv), and so do products of 16 bits, which C++ would make in an int.

template <typename T>
T add(T a, T b) {
  return static_cast<T>(a + b);
}

template <typename T>
T sub(T a, T b) {
  return static_cast<T>(a - b);
}

template <typename T>
T mul(T a, T b) {
  return a * b;
}

template <typename T>
T mul_lo(T a, T b) {
  return static_cast<T>(a * b);
}

template <typename T>
T mul_hi(T a, T b) {
  static_assert(sizeof(T) == 4);
  using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  return static_cast<T>(static_cast<Wide>(a) * b >> 32);
}

template <typename T>
auto mul_wide(T a, T b) {
  if constexpr (sizeof(T) == 4) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return static_cast<Wide>(a) * b;
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>;
    return static_cast<Wide>(static_cast<Wide>(a) * b);
  }
}

template <typename T>
T mad_lo(T a, T b, T c) {
  return static_cast<T>(a * b + c);
}

template <typename T>
T div(T a, T b) {
  return a / b;
}

template <typename T>
T rem(T a, T b) {
  return a % b;
}

template <typename T>
T neg(T a) {
  return static_cast<T>(-a);
}

// Of a NaN and a number, the number.
template <typename T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}

template <typename T>
T and_(T a, T b) {
  return a & b;
}

template <typename T>
T or_(T a, T b) {
  return a | b;
}

template <typename T>
T xor_(T a, T b) {
  return a ^ b;
}

template <typename T>
T not_(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~a);
  }
}

// As far as the register is wide, and no further.
template <typename T>
T shl(T a, uint32_t distance) {
  return distance < 8 * sizeof(T) ? static_cast<T>(a << distance) : T(0);
}

template <typename T>
T shr(T a, uint32_t distance) {
  const uint32_t most = 8 * sizeof(T) - 1;
  if (distance <= most) return static_cast<T>(a >> distance);
  return std::is_signed_v<T> ? static_cast<T>(a >> most) : T(0);
}

// Any function of three bits: bit 4 * a + 2 * b + c of `table`.
template <typename T>
T lop3(T a, T b, T c, uint32_t table) {
  T result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// Four bytes of eight, each chosen by 4 bits, of which the highest asks for 8 times its sign instead.
template <typename T>
T prmt(T a, T b, uint32_t choices) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  T result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = choices >> 4 * i;
    const uint8_t byte = static_cast<uint8_t>(bytes >> 8 * (choice & 7));
    const uint8_t sign = byte & 0x80 ? 0xFF : 0;
    result |= static_cast<T>(choice & 8 ? sign : byte) << 8 * i;
  }
  return result;
}

// The lowest bits of a over those of b from `first` on.
template <typename T>
T bfi(T a, T b, uint32_t first, uint32_t num_bits) {
  const T ones = num_bits < 8 * sizeof(T) ? (T(1) << num_bits) - 1 : ~T(0);
  return (b & ~shl(ones, first)) | shl<T>(a & ones, first);
}

template <typename T>
T selp(T a, T b, bool takes_a) {
  return takes_a ? a : b;
}

template <typename T>
bool setp_eq(T a, T b) {
  return a == b;
}

// With a NaN, false; neu: true.
template <typename T>
bool setp_ne(T a, T b) {
  return a < b || a > b;
}

template <typename T>
bool setp_neu(T a, T b) {
  return a != b;
}

template <typename T>
bool setp_lt(T a, T b) {
  return a < b;
}

template <typename T>
bool setp_le(T a, T b) {
  return a <= b;
}

template <typename T>
bool setp_gt(T a, T b) {
  return a > b;
}

template <typename T>
bool setp_ge(T a, T b) {
  return a >= b;
}

template <typename T>
bool setp_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b);
}

template <typename T>
T fma_rn(T a, T b, T c) {
  if constexpr (std::is_same_v<T, f32>) {
    return std::fma(a, b, c);
  } else if constexpr (std::is_same_v<T, f16x2>) {
    return {multiply_add<Float16>(a.bits, b.bits, c.bits)};
  } else {
    return {multiply_add<BFloat16>(a.bits, b.bits, c.bits)};
  }
}

// Rounded towards minus infinity: what the exact sum (of a double, and what the double lost) is less than is above it.
template <typename T>
T fma_rm(T a, T b, T c) {
  const T nearest = std::fma(a, b, c);
  const double product = static_cast<double>(a) * b, sum = product + c, taken = sum - product;
  const double lost = (product - (sum - taken)) + (c - taken);
  const bool is_above = (sum - nearest) + lost < 0;
  return is_above ? std::nextafter(nearest, -std::numeric_limits<T>::infinity()) : nearest;
}

template <typename T>
T div_rn(T a, T b) {
  return a / b;
}

template <typename T>
T rcp_rn(T a) {
  return 1 / a;
}

template <typename T>
T sqrt_rn(T a) {
  return std::sqrt(a);
}

template <typename T>
T abs(T a) {
  return std::fabs(a);
}

// The second operand's size, the first one's sign.
template <typename T>
T copysign(T sign, T size) {
  return std::copysign(size, sign);
}

// Numbers too small for a whole mantissa are 0.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

template <typename T>
T ex2_approx_ftz(T a) {
  return flush(std::exp2(flush(a)));
}

template <typename T>
T rcp_approx_ftz(T a) {
  return flush(1 / flush(a));
}

template <typename To, typename From>
To cvt(From from) {
  if constexpr (std::is_same_v<From, f16>) return to_float(from);
  else return static_cast<To>(from);
}

template <typename To, typename From>
To cvt_rn(From from) {
  if constexpr (std::is_integral_v<From>) return static_cast<To>(from);
  else return from_float<To>(from);
}

// The first operand is the upper half.
template <typename To, typename From>
To cvt_rn(From high, From low) {
  if constexpr (std::is_same_v<To, f16x2>) return {pack<Float16>(low, high)};
  else return {pack<BFloat16>(low, high)};
}

template <typename To, typename From>
To cvt_rni(From from) {
  return std::nearbyint(from);
}

// Towards zero, NaN to 0, and no further than the integer's range.
template <typename To, typename From>
To cvt_rzi(From from) {
  if (std::isnan(from)) return 0;
  if (from <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (from >= static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(from);
}

// To [0, 1], NaN to 0.
template <typename To, typename From>
To cvt_sat(From from) {
  return from > 0 ? std::fmin(from, To(1)) : To(0);
}

}  // namespace ptx
