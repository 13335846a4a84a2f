// Every 8-bit element there is, by each way into products; and floats, rounded to elements.
#include "device.cuh"
#include "eight_bit.cuh"

namespace {

// Elements 0 to 255 from both bytes that `widen` looks at, and from its other two; out: [256, 2].
template <typename E, typename K>
void widen_all(float* out) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const uint32_t other = 255 - bits, pair = widen<E, K>(bits | other << 8 | bits << 16 | other << 24);
    for (int i = 0; i < 2; ++i) out[2 * bits + i] = half_of_register<E>(pair, i) * kPackedUnit<K>;
  }
}

template <typename K>
void read_all(float* out) {
  for (int bits = 0; bits < 256; ++bits) {
    const uint8_t byte = bits;
    K element;
    memcpy(&element, &byte, sizeof(element));
    out[bits] = to_float(element);
  }
}

template <typename K>
void quantize_all(const float* rows, const float* scales, uint8_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const K element = quantize<K>(rows[i], scales[i]);
    memcpy(out + i, &element, sizeof(element));
  }
}

}  // namespace

extern "C" {

void widen_bfloat16_int8(float* out) { widen_all<BFloat16, Int8>(out); }
void widen_bfloat16_float8_e4m3fn(float* out) { widen_all<BFloat16, Float8>(out); }
void widen_float16_int8(float* out) { widen_all<Float16, Int8>(out); }
void widen_float16_float8_e4m3fn(float* out) { widen_all<Float16, Float8>(out); }
void read_int8(float* out) { read_all<Int8>(out); }
void read_float8_e4m3fn(float* out) { read_all<Float8>(out); }

void quantize_int8(const float* rows, const float* scales, uint8_t* out, int64_t count) {
  quantize_all<Int8>(rows, scales, out, count);
}
void quantize_float8_e4m3fn(const float* rows, const float* scales, uint8_t* out, int64_t count) {
  quantize_all<Float8>(rows, scales, out, count);
}
}
