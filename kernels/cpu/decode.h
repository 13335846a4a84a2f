// Attention of one token over one partition of its KV, for the query heads that share a KV head, and for as many
// sequences as share the partition.
//
// Memory-bound: each element of keys and values is read once, while the blocks that come next are prefetched. Keys are
// scored for a chunk of tokens, the chunk's weights follow, then its values are added. All sums are float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "blocks.h"
#include "simd.h"
#include "softmax.h"

namespace pagoda {

constexpr int kChunk = 128;           // tokens
constexpr int kMaxRows = kLanes / 2;  // their accumulators fill the registers

template <class Element, int kRows>
class DecodeTile {
 public:
  // queries: [num_rows], each [head_dim]; rows past num_rows (at most kRows) are zeros that nobody reads.
  DecodeTile(const Element* const* queries, int num_rows, int head_dim, float scale)
      : head_dim_(head_dim), padded_dim_((head_dim + kPair - 1) / kPair * kPair) {
    for (int row = 0; row < kRows; ++row) {
      for (int d = 0; d < padded_dim_; d += kPair) {
        FloatPair x = {};
        if (row < num_rows) x = load_pair_first(queries[row] + d, std::min(kPair, head_dim - d));
        store_pair(query_[row] + d, {x.first * (scale * kLog2E), x.second * (scale * kLog2E)});
        store_pair(sums_[row] + d, FloatPair{});
      }
    }
  }

  void attend(const Partition<Element>& kv) {
    for (int chunk = kv.begin & -kv.keys.block_size(); chunk < kv.end; chunk += kChunk) {
      const int first = std::max(chunk, kv.begin), last = std::min(chunk + kChunk, kv.end);
      score(kv, chunk, last);
      weigh(first - chunk, last - chunk);
      add_values<kPairs>(kv, {chunk, first, last, 0});
    }
  }

  // The attention output of a row over the partition alone.
  void write(int row, Element* output) const {
    const float inverse = 1.0f / states_[row].norm;
    for (int d = 0; d < head_dim_; d += kPair) {
      const FloatPair x = load_pair(sums_[row] + d);
      store_pair_first(output + d, {x.first * inverse, x.second * inverse}, std::min(kPair, head_dim_ - d));
    }
  }

  // What a merge needs of a row. sums: head_dim rounded up to pairs, in their order; norm: [2].
  void write_partial(int row, float* sums, float* norm) const {
    std::memcpy(sums, sums_[row], padded_dim_ * sizeof(float));
    norm[0] = states_[row].maximum;
    norm[1] = states_[row].norm;
  }

 private:
  static constexpr int kTokens = kLanes / kRows;     // scored at once: one accumulator per row and token
  static constexpr int kPairs = kLanes / kRows / 2;  // of dimensions summed at once: two accumulators per row and pair

  // Values of tokens first to last are added to the sums from dimension d on.
  struct Strip {
    int chunk, first, last, d;
  };

  // Scores of the chunk's tokens up to the end of the last block: scores_[row][token].
  void score(const Partition<Element>& kv, int chunk, int last) {
    const int block_size = kv.keys.block_size();
    for (int token = chunk; token < last; token += block_size) {
      const Element* key = kv.keys.slot(token);
      const int next = token + kBlocksAhead * block_size;
      const Element* ahead = next < last ? kv.keys.slot(next) : kv.values.slot(std::min(chunk + next - last, last - 1));
      for (int i = 0; i < block_size; i += kTokens) {
        prefetch_elements(ahead + i * head_dim_, kTokens * head_dim_);
        score_tokens(key + i * head_dim_, token - chunk + i);
      }
    }
  }

  void score_tokens(const Element* key, int column) {
    Floats products[kLanes] = {};
    int d = 0;
    for (; d + kPair <= head_dim_; d += kPair) {
      multiply(products, d, [=](int token) { return load_pair(key + token * head_dim_ + d); });
    }
    if (d < head_dim_) {
      multiply(products, d, [=](int token) { return load_pair_first(key + token * head_dim_ + d, head_dim_ - d); });
    }
    alignas(kAlignment) float scores[kLanes];
    store(scores, sum_each(products));
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(scores_[row] + column, scores + row * kTokens, kTokens * sizeof(float));
    }
  }

  // Whichever there are fewer of, tokens' keys or rows' queries, stays in registers.
  template <class LoadKey>
  void multiply(Floats (&products)[kLanes], int d, LoadKey load_key) const {
    if constexpr (kTokens < kRows) {
      FloatPair keys[kTokens];
      for (int token = 0; token < kTokens; ++token) keys[token] = load_key(token);
      for (int row = 0; row < kRows; ++row) {
        const FloatPair query = load_pair(query_[row] + d);
        for (int token = 0; token < kTokens; ++token) add_product(products[row * kTokens + token], query, keys[token]);
      }
    } else {
      FloatPair queries[kRows];
      for (int row = 0; row < kRows; ++row) queries[row] = load_pair(query_[row] + d);
      for (int token = 0; token < kTokens; ++token) {
        const FloatPair key = load_key(token);
        for (int row = 0; row < kRows; ++row) add_product(products[row * kTokens + token], queries[row], key);
      }
    }
  }

  static void add_product(Floats& sum, FloatPair a, FloatPair b) {
    sum += a.first * b.first;
    sum += a.second * b.second;
  }

  // Turns the scores of columns first to last into weights, and notes by how much what was summed before shrinks.
  void weigh(int first, int last) {
    const int columns = (last + kLanes - 1) / kLanes * kLanes;
    for (int row = 0; row < kRows; ++row) {
      float* scores = scores_[row];
      std::fill(scores, scores + first, kHidden);
      std::fill(scores + last, scores + columns, kHidden);
      decay_[row] = states_[row].weigh(scores, columns);
    }
  }

  // sums += weights * values, kWidth pairs of dimensions at a time as long as there are so many, then half as many.
  template <int kWidth>
  void add_values(const Partition<Element>& kv, Strip strip) {
    for (; strip.d + kWidth * kPair <= head_dim_; strip.d += kWidth * kPair) {
      add_strip<kWidth>(kv, strip, [](const Element* value) { return load_pair(value); });
    }
    if constexpr (kWidth > 1) {
      add_values<kWidth / 2>(kv, strip);
    } else if (strip.d < head_dim_) {
      const int count = head_dim_ - strip.d;
      add_strip<1>(kv, strip, [=](const Element* value) { return load_pair_first(value, count); });
    }
  }

  template <int kWidth, class LoadValue>
  void add_strip(const Partition<Element>& kv, Strip strip, LoadValue load_value) {
    FloatPair sums[kRows][kWidth];
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) {
        const FloatPair x = load_pair(sums_[row] + strip.d + i * kPair);
        sums[row][i] = {x.first * decay_[row], x.second * decay_[row]};
      }
    }
    const int block_size = kv.values.block_size();
    for (int token = strip.first; token < strip.last;) {
      const int block_end = std::min(strip.last, (token & -block_size) + block_size);
      const int next = token + kBlocksAhead * block_size;
      const Element* ahead = next < strip.last ? kv.values.slot(next) : kv.keys.slot(std::min(next, kv.end - 1));
      const Element* value = kv.values.slot(token) + strip.d;
      const float* weights = scores_[0] + token - strip.chunk;
      for (ahead += strip.d; token < block_end; ++token, ++weights, value += head_dim_, ahead += head_dim_) {
        prefetch_elements(ahead, kWidth * kPair);
        for (int i = 0; i < kWidth; ++i) {
          const FloatPair x = load_value(value + i * kPair);
          for (int row = 0; row < kRows; ++row) {
            sums[row][i].first += x.first * weights[row * kChunk];
            sums[row][i].second += x.second * weights[row * kChunk];
          }
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kWidth; ++i) store_pair(sums_[row] + strip.d + i * kPair, sums[row][i]);
    }
  }

  // From the block in use to the one that is prefetched, in the order of reading: keys of a chunk, its values ...
  static constexpr int kBlocksAhead = 1;

  static void prefetch_elements(const Element* first, int count) {
    constexpr int kLine = kAlignment / sizeof(Element);
    for (int i = 0; i < count; i += kLine) prefetch(first + i);
  }

  int head_dim_, padded_dim_;
  alignas(kAlignment) float query_[kRows][kMaxHeadDim];
  alignas(kAlignment) float sums_[kRows][kMaxHeadDim];
  alignas(kAlignment) float scores_[kRows][kChunk];
  RowState states_[kRows];
  float decay_[kRows];
};

}  // namespace pagoda
