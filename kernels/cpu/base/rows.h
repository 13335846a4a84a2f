// Rows of a layer's tensors as float32, with the norm that comes before a matrix product and the gate that comes
// behind.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"

namespace pagoda {

// Calls apply(d, count) for vectors of `width` elements: count is kLanes, or less for the last.
template <class Apply>
inline void for_vectors(int width, Apply apply) {
  int d = 0;
  for (; d + kLanes <= width; d += kLanes) apply(d, kLanes);
  if (d < width) apply(d, width - d);
}

template <class Element>
inline Floats load_some(const Element* from, int count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

template <class Element>
inline void store_some(Element* to, Floats x, int count) {
  count == kLanes ? store(to, x) : store_first(to, x, count);
}

// Sums, in whole vectors, times `factor`, as the `width` elements of a row.
inline void store_scaled(const float* sums, float factor, Element* row, int width) {
  for_vectors(width, [&](int d, int count) { store_some(row + d, load(sums + d) * factor, count); });
}

// `width` elements, from one place of a tensor to one of another.
inline void copy_row(const void* from, int64_t from_at, void* to, int64_t to_at, int width) {
  std::memcpy(static_cast<Element*>(to) + to_at, static_cast<const Element*>(from) + from_at, width * sizeof(Element));
}

// 1 / root of the mean of squares.
template <class Element>
inline float inverse_rms(const Element* row, int width, float epsilon) {
  Floats squares = {};
  for_vectors(width, [&](int d, int count) {
    const Floats x = load_some(row + d, count);
    squares += x * x;
  });
  return 1.0f / std::sqrt(sum(squares) / width + epsilon);
}

template <class To>
inline void normalize(const Element* row, const Element* weight, To* to, int width, float epsilon) {
  const float scale = inverse_rms(row, width, epsilon);
  for_vectors(width, [&](int d, int count) {
    store_some(to + d, load_some(row + d, count) * scale * load_some(weight + d, count), count);
  });
}

// As exact as an Element is.
inline Floats silu(Floats x) {
  const Floats exponent = (x < 0.0f ? x : -x) * kLog2E;
  const Floats power = std::is_same_v<Element, BFloat16> ? exp2_rough(exponent) : exp2(exponent);
  return x * (x < 0.0f ? power : broadcast(1.0f)) / (power + 1.0f);
}

template <class To>
inline void convert(const Element* row, To* to, int width) {
  for_vectors(width, [&](int d, int count) { store_some(to + d, load_some(row + d, count), count); });
}

}  // namespace pagoda
