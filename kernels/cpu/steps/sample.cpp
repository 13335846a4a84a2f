// A random token of each row: softmax, top_k, top_p, min_p, and the choice. kernels/sampling.py is the specification.
//
// Owns the order of sums, which follows from the row alone. Shares are relative to the likeliest token's, so nothing
// has to be divided. What top_k and top_p keep is found in a histogram over the shares' leading bits: only the bucket
// in which a border lies is sorted.
#include <algorithm>
#include <functional>
#include <vector>

#include "sample.h"
#include "../attention/blocks.h"
#include "../base/elements.h"
#include "../base/rows.h"
#include "../base/team.h"

namespace pagoda {
namespace {

constexpr int kChunkTokens = 256;

// Shares of one row, in [0, 1], by size.
class Ranking {
 public:
  explicit Ranking(const std::vector<float>& shares) : shares_(shares) {
    for (const float share : shares) {
      const int b = bucket_of(share);
      ++counts_[b];
      masses_[b] += share;
    }
  }

  struct Top {
    float lowest;
    double mass;
  };

  // The `count` highest shares: at least one.
  Top top(int64_t count) {
    double mass = 0.0;
    int b = kBuckets - 1;
    for (; b > 0 && counts_[b] < count; --b) {
      count -= counts_[b];
      mass += masses_[b];
    }
    const std::vector<float>& bucket = sorted(b);
    for (int64_t i = 0; i < count; ++i) mass += bucket[i];
    return {bucket[count - 1], mass};
  }

  // The lowest of the highest shares that together have a mass of `wanted`.
  float lowest_within(double wanted) {
    double mass = 0.0;
    int b = kBuckets - 1;
    for (; b > 0 && mass + masses_[b] < wanted; --b) mass += masses_[b];
    for (const float share : sorted(b)) {
      mass += share;
      if (mass >= wanted) return share;
    }
    return 0.0f;
  }

 private:
  static constexpr int kShift = 20;  // leaves the exponent and three bits of the fraction
  static constexpr int kBuckets = (0x3f800000 >> kShift) + 1;

  static int bucket_of(float share) {
    int32_t bits;
    std::memcpy(&bits, &share, sizeof bits);
    return std::clamp(bits >> kShift, 0, kBuckets - 1);
  }

  const std::vector<float>& sorted(int bucket) {
    if (bucket != sorted_bucket_) {
      sorted_bucket_ = bucket;
      sorted_.clear();
      for (const float share : shares_) {
        if (bucket_of(share) == bucket) sorted_.push_back(share);
      }
      std::sort(sorted_.begin(), sorted_.end(), std::greater<>());
    }
    return sorted_;
  }

  const std::vector<float>& shares_;
  int64_t counts_[kBuckets] = {};
  double masses_[kBuckets] = {};
  int sorted_bucket_ = -1;
  std::vector<float> sorted_;
};

// Shares of one row; its memory serves the next.
class Row {
 public:
  void read(const float* logits, int64_t vocab_size, float temperature) {
    vocab_size_ = vocab_size;
    const int64_t num_chunks = (vocab_size + kChunkTokens - 1) / kChunkTokens;
    sums_.resize(num_chunks);
    shares_.resize(num_chunks * kChunkTokens);
    std::fill(shares_.begin() + vocab_size, shares_.end(), 0.0f);
    Floats tops = broadcast(kHidden);
    for_vectors(vocab_size, [&](int i, int count) {
      tops = max(count == kLanes ? load(logits + i) : select_first(load_first(logits + i, count), count), tops);
    });
    const float highest = largest(tops), factor = kLog2E / temperature;
    for_vectors(vocab_size, [&](int i, int count) {
      store_some(&shares_[i], exp2((load_some(logits + i, count) - highest) * factor), count);
    });
  }

  // The lowest share that top_k, then top_p of what is left, keep.
  float top_bound(int64_t top_k, float top_p) {
    const bool is_all = top_k <= 0 || top_k >= vocab_size_;
    if (is_all && top_p >= 1.0f) return 0.0f;
    Ranking ranking(shares_);
    if (is_all) return ranking.lowest_within(top_p * add_up(0.0f));
    const Ranking::Top top = ranking.top(top_k);
    return top_p < 1.0f ? std::max(top.lowest, ranking.lowest_within(top_p * top.mass)) : top.lowest;
  }

  // The id at which the running sum of the shares from `bound` on passes `uniform` of all: first the chunk, then the
  // id. Where rounding leaves the target behind them all, the last.
  int64_t choose(float bound, double uniform) {
    const double target = uniform * add_up(bound);
    size_t chunk = 0;
    double before = 0.0, after = 0.0;
    for (size_t i = 0; i < sums_.size() && after <= target; ++i) {
      if (sums_[i] == 0.0) continue;
      chunk = i;
      before = after;
      after += sums_[i];
    }
    int64_t token_id = 0;
    for (size_t i = chunk * kChunkTokens; i < (chunk + 1) * kChunkTokens && before <= target; ++i) {
      if (shares_[i] < bound || shares_[i] == 0.0f) continue;
      token_id = i;
      before += shares_[i];
    }
    return token_id;
  }

 private:
  // The sum of the shares from `bound` on, and those of all chunks in sums_.
  double add_up(float bound) {
    double total = 0.0;
    for (size_t chunk = 0; chunk < sums_.size(); ++chunk) {
      Floats sums = {};
      for (int i = 0; i < kChunkTokens; i += kLanes) {
        const Floats x = load(&shares_[chunk * kChunkTokens + i]);
        sums += x >= bound ? x : broadcast(0.0f);
      }
      total += sums_[chunk] = sum(sums);
    }
    return total;
  }

  // Lanes from `count` on hidden.
  static Floats select_first(Floats x, int count) {
    for (int i = count; i < kLanes; ++i) x[i] = kHidden;
    return x;
  }

  int64_t vocab_size_ = 0;
  std::vector<float> shares_;  // whole chunks, zeros past the vocabulary
  std::vector<double> sums_;   // of the chunks
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_sample(const pagoda::SampleCall* call) {
  pagoda::for_units(call->num_threads, call->num_draws, [=](int64_t i) {
    thread_local pagoda::Row row;
    row.read(call->logits + call->rows[i] * call->vocab_size, call->vocab_size, call->temperatures[i]);
    const float bound = std::max(call->min_p[i], row.top_bound(call->top_k[i], call->top_p[i]));
    call->token_ids[i] = row.choose(bound, call->uniforms[i]);
  });
}

#pragma GCC visibility pop
