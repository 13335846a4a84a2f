// Decode steps of some of the sequences of a call.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "../base/rows.h"
#include "steps.h"

namespace pagoda {

// What sequences `begin` to `end` have of a work list of decodes. Their numbers begin at 0.
class WorkPart {
 public:
  WorkPart(const Work& all, int begin, int end, int num_threads) : work_(all) {
    const int32_t* end_of_items = all.seqs + all.cluster_starts[all.num_clusters];
    const auto item_of = [&](int seq) { return std::lower_bound(all.seqs, end_of_items, seq) - all.seqs; };
    first_item_ = item_of(begin);
    const int64_t end_item = item_of(end);
    for (int64_t item = first_item_; item < end_item; ++item) seqs_.push_back(all.seqs[item] - begin);
    take_clusters(all);
    take_merges(all);
    work_.num_threads = num_threads;
    work_.seqs = work_.query_starts = seqs_.data();
    work_.num_queries += first_item_;
    work_.kv_starts += first_item_;
    work_.kv_ends += first_item_;
    work_.partials += first_item_;
    work_.block_tables += static_cast<int64_t>(begin) * all.table_stride;
    work_.context_lens += begin;
  }
  WorkPart(const WorkPart&) = delete;

  const Work& work() const { return work_; }
  int64_t first_item() const { return first_item_; }  // of the whole
  int num_items() const { return static_cast<int>(seqs_.size()); }

 private:
  bool has(int64_t item) const { return first_item_ <= item && item < first_item_ + num_items(); }

  // In their order, without items of others.
  void take_clusters(const Work& all) {
    for (int cluster = 0; cluster < all.num_clusters; ++cluster) {
      const size_t start = order_.size();
      for (int i = all.cluster_starts[cluster]; i < all.cluster_starts[cluster + 1]; ++i) {
        if (has(all.order[i])) order_.push_back(all.order[i] - first_item_);
      }
      if (order_.size() > start) starts_.push_back(start);
    }
    work_.num_clusters = starts_.size();
    starts_.push_back(order_.size());
    work_.cluster_starts = starts_.data();
    work_.order = order_.data();
  }

  void take_merges(const Work& all) {
    for (int merge = 0; merge < all.num_merges; ++merge) {
      if (!has(all.merge_items[merge])) continue;
      merge_items_.push_back(all.merge_items[merge] - first_item_);
      merge_counts_.push_back(all.merge_counts[merge]);
    }
    work_.num_merges = merge_items_.size();
    work_.merge_items = merge_items_.data();
    work_.merge_counts = merge_counts_.data();
  }

  Work work_;
  int64_t first_item_;
  std::vector<int32_t> seqs_, order_, starts_, merge_items_, merge_counts_;
};

// What sequences `begin` to `end` have of a call. Rows of it are as far apart as in the whole.
class Part {
 public:
  Part(const StepsCall& all, int64_t begin, int64_t end, int num_threads) : layers_(*all.layers), steps_(all) {
    layers_.num_threads = num_threads;
    take_works(begin, end);
    take_rows(begin, end - begin);
    take_choices(begin);
    if (all.sample) take_draws(*all.sample, begin, end);
  }
  Part(const Part&) = delete;

  const StepsCall& call() const { return steps_; }

 private:
  void take_works(int64_t begin, int64_t end) {
    int num_windows = 0;
    for (int i = 0; i < layers_.num_layers; ++i) num_windows = std::max(num_windows, layers_.layers[i].window + 1);
    for (int i = 0; i < num_windows; ++i) {
      windows_.push_back(layers_.windows[i]);
      windows_[i].work = &works_.emplace_back(*windows_[i].work, begin, end, layers_.num_threads).work();
    }
    layers_.windows = windows_.data();
    steps_.kv_ends += works_[0].first_item();
    steps_.item_seqs = works_[0].work().seqs;
    steps_.num_items = works_[0].num_items();
    steps_.context_lens += begin;
    steps_.block_tables += begin * steps_.table_stride;
  }

  void take_rows(int64_t begin, int64_t num_rows) {
    const Layer& layer = layers_.layers[0];
    const int half_dim = layers_.shape->head_dim / 2;
    layers_.hidden = layers_.output = row(layers_.hidden, begin * layer.qkv.num_inputs);
    layers_.heads = row(layers_.heads, begin * layer.qkv.num_outputs);
    layers_.attended = row(layers_.attended, begin * layer.o.num_inputs);
    layers_.gated = row(layers_.gated, begin * layer.down.num_inputs);
    layers_.cos = steps_.cos = row(steps_.cos, begin * half_dim);
    layers_.sin = steps_.sin = row(steps_.sin, begin * half_dim);
    layers_.slot_mapping = steps_.slot_mapping = steps_.slot_mapping + begin;
    layers_.num_tokens = layers_.num_outputs = num_rows;
    steps_.layers = &layers_;
  }

  void take_choices(int64_t begin) {
    steps_.choices += begin;
    if (steps_.logits) steps_.logits += begin * steps_.lm_head->num_outputs;
  }

  void take_draws(const SampleCall& all, int64_t begin, int64_t end) {
    const int64_t* end_of_draws = all.rows + all.num_draws;
    const int64_t first = std::lower_bound(all.rows, end_of_draws, begin) - all.rows;
    for (int64_t i = first; i < all.num_draws && all.rows[i] < end; ++i) draws_.push_back(all.rows[i] - begin);
    sample_ = {steps_.logits,      draws_.data(),        all.temperatures + first, all.top_k + first,
               all.top_p + first,  all.min_p + first,    all.uniforms + first,     all.token_ids + first,
               static_cast<int64_t>(draws_.size()), all.vocab_size, layers_.num_threads};
    steps_.sample = &sample_;
  }

  static void* row(void* first, int64_t element) { return static_cast<Element*>(first) + element; }

  LayersCall layers_;
  StepsCall steps_;
  SampleCall sample_;
  std::deque<WorkPart> works_;
  std::vector<WindowWork> windows_;
  std::vector<int64_t> draws_;
};

}  // namespace pagoda
