// Attention of one token over one partition of its KV, for the query heads that share a KV head.
//
// Memory-bound: each element of keys and values is read once, while the blocks that come next are prefetched. Keys are
// scored for a chunk of tokens, the chunk's weights follow, then its values are added. All sums are float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "blocks.h"
#include "simd.h"

namespace pagoda {

constexpr int kChunk = 128;  // tokens
template <class Element, int kRows>
class DecodeTile {
 public:
  // query: [num_rows, head_dim]; rows past num_rows (at most kRows) are zeros that nobody reads.
  DecodeTile(const Element* query, int num_rows, int head_dim, float scale)
      : num_rows_(num_rows), head_dim_(head_dim), padded_dim_((head_dim + kLanes - 1) / kLanes * kLanes) {
    for (int row = 0; row < kRows; ++row) {
      for (int d = 0; d < padded_dim_; d += kLanes) {
        const int count = row < num_rows ? std::min(kLanes, head_dim - d) : 0;
        const Floats x = count > 0 ? load_first(query + row * head_dim + d, count) : Floats{};
        store(query_ + row * padded_dim_ + d, x * (scale * kLog2E));
        store(sums_ + row * padded_dim_ + d, Floats{});
      }
      maxima_[row] = kHidden;
      norms_[row] = 0.0f;
    }
  }

  void attend(const Partition<Element>& kv) {
    const int block_size = kv.keys.block_size;
    for (int chunk = kv.begin / block_size * block_size; chunk < kv.end; chunk += kChunk) {
      const int first = std::max(chunk, kv.begin), last = std::min(chunk + kChunk, kv.end);
      score(kv, chunk, last);
      weigh(first - chunk, last - chunk);
      add_values<kLanes / kRows>(kv, chunk, first, last, 0);
    }
  }

  // The attention output of the partition alone.
  void write(Element* output) const {
    for (int row = 0; row < num_rows_; ++row) {
      const float inverse = 1.0f / norms_[row];
      for (int d = 0; d < head_dim_; d += kLanes) {
        store_first(output + row * head_dim_ + d, load(sums_ + row * padded_dim_ + d) * inverse,
                    std::min(kLanes, head_dim_ - d));
      }
    }
  }

  // What a merge needs of it.
  void write_partial(float* sums, float* norms) const {
    for (int row = 0; row < num_rows_; ++row) {
      std::memcpy(sums + row * head_dim_, sums_ + row * padded_dim_, head_dim_ * sizeof(float));
      norms[2 * row] = maxima_[row];
      norms[2 * row + 1] = norms_[row];
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  static constexpr int kTokens = kLanes / kRows;  // scored at once: one accumulator per row and token

  // Scores of the chunk's tokens up to the end of the last block: scores_[row][token].
  void score(const Partition<Element>& kv, int chunk, int last) {
    const int block_size = kv.keys.block_size;
    for (int token = chunk; token < last; token += block_size) {
      const Element* key = kv.keys.slot(token);
      const char* ahead = ahead_of_keys(kv, token, chunk, last);
      for (int i = 0; i < block_size; i += kTokens) {
        prefetch_tokens(ahead, i);
        score_tokens(key + i * head_dim_, token - chunk + i);
      }
    }
  }

  void score_tokens(const Element* key, int column) {
    Floats products[kLanes] = {};
    int d = 0;
    for (; d + kLanes <= head_dim_; d += kLanes) {
      multiply(products, d, [=](int token) { return load(key + token * head_dim_ + d); });
    }
    if (d < head_dim_) {
      multiply(products, d, [=](int token) { return load_first(key + token * head_dim_ + d, head_dim_ - d); });
    }
    alignas(kAlignment) float scores[kLanes];
    store(scores, sum_each(products));
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(scores_[row] + column, scores + row * kTokens, kTokens * sizeof(float));
    }
  }

  template <class LoadKey>
  void multiply(Floats (&products)[kLanes], int d, LoadKey load_key) const {
    Floats keys[kTokens];
    for (int token = 0; token < kTokens; ++token) keys[token] = load_key(token);
    for (int row = 0; row < kRows; ++row) {
      const Floats query = load(query_ + row * padded_dim_ + d);
      for (int token = 0; token < kTokens; ++token) products[row * kTokens + token] += query * keys[token];
    }
  }

  // Turns the scores of columns first to last into weights, and scales what was summed before to the new maximum.
  void weigh(int first, int last) {
    const int columns = (last + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < kRows; ++row) {
      float* scores = scores_[row];
      std::fill(scores, scores + first, kHidden);
      std::fill(scores + last, scores + columns, kHidden);
      Floats top = broadcast(maxima_[row]);
      for (int i = 0; i < columns; i += kLanes) top = max(load(scores + i), top);
      const float maximum = largest(top);
      Floats total = {};
      for (int i = 0; i < columns; i += kLanes) {
        const Floats weights = exp2(load(scores + i) - maximum);
        store(scores + i, weights);
        total += weights;
      }
      decay_[row] = std::exp2(maxima_[row] - maximum);
      norms_[row] = norms_[row] * decay_[row] + sum(total);
      maxima_[row] = maximum;
    }
  }

  // sums += weights * values from dimension d on, kColumns vectors at a time: that many accumulators per row.
  template <int kColumns>
  void add_values(const Partition<Element>& kv, int chunk, int first, int last, int d) {
    for (; d + kColumns * kLanes <= head_dim_; d += kColumns * kLanes) {
      add_strip<kColumns>(kv, chunk, first, last, d, [](const Element* value) { return load(value); });
    }
    if constexpr (kColumns > 1) {
      add_values<kColumns / 2>(kv, chunk, first, last, d);
    } else if (d < head_dim_) {
      const int count = head_dim_ - d;
      add_strip<1>(kv, chunk, first, last, d, [=](const Element* value) { return load_first(value, count); });
    }
  }

  template <int kColumns, class LoadValue>
  void add_strip(const Partition<Element>& kv, int chunk, int first, int last, int d, LoadValue load_value) {
    const int block_size = kv.values.block_size;
    Floats sums[kRows][kColumns];
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kColumns; ++i) sums[row][i] = load(sums_ + row * padded_dim_ + d + i * kLanes) * decay_[row];
    }
    for (int token = first; token < last;) {
      const int block_end = std::min(last, (token / block_size + 1) * block_size);
      const char* ahead = ahead_of_values(kv, token, last) + d * sizeof(Element);
      for (const Element* value = kv.values.slot(token) + d; token < block_end; ++token, value += head_dim_) {
        prefetch_strip(ahead, token % block_size, kColumns);
        for (int i = 0; i < kColumns; ++i) {
          const Floats x = load_value(value + i * kLanes);
          for (int row = 0; row < kRows; ++row) sums[row][i] += x * scores_[row][token - chunk];
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kColumns; ++i) store(sums_ + row * padded_dim_ + d + i * kLanes, sums[row][i]);
    }
  }

  // --- Prefetching: kBlocksAhead blocks on in the order in which they are read.

  static constexpr int kBlocksAhead = 2;
  static constexpr int kLine = 64;  // bytes

  const char* ahead_of_keys(const Partition<Element>& kv, int token, int chunk, int last) const {
    const int next = token + kBlocksAhead * kv.keys.block_size;
    const int beyond = chunk + next - last;
    const Element* slot = next < last ? kv.keys.slot(next) : kv.values.slot(std::min(beyond, last - 1));
    return reinterpret_cast<const char*>(slot);
  }

  const char* ahead_of_values(const Partition<Element>& kv, int token, int last) const {
    const int block_start = token / kv.values.block_size * kv.values.block_size;
    const int next = block_start + kBlocksAhead * kv.values.block_size;
    const Element* slot = next < last ? kv.values.slot(next) : kv.keys.slot(std::min(next, kv.end - 1));
    return reinterpret_cast<const char*>(slot);
  }

  void prefetch_tokens(const char* block, int token) const {
    const int bytes = head_dim_ * sizeof(Element);
    for (int i = 0; i < kTokens * bytes; i += kLine) prefetch(block + token * bytes + i);
  }

  void prefetch_strip(const char* block, int token, int columns) const {
    const int bytes = head_dim_ * sizeof(Element);
    const int width = columns * kLanes * sizeof(Element);
    for (int i = 0; i < width; i += kLine) prefetch(block + token * bytes + i);
  }

  int num_rows_, head_dim_, padded_dim_;
  alignas(kAlignment) float query_[kRows * kMaxHeadDim];
  alignas(kAlignment) float sums_[kRows * kMaxHeadDim];
  alignas(kAlignment) float scores_[kRows][kChunk];
  float maxima_[kRows], norms_[kRows], decay_[kRows];
};

}  // namespace pagoda
