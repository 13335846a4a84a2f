// Some decode steps in one call: between two short ones, Python would take as long as either.
#include "steps.h"

#include <algorithm>

#include "../base/dots.h"
#include "../base/rows.h"
#include "../base/team.h"
#include "parts.h"

extern "C" {
void pagoda_greedy(const float* logits, int64_t* choices, int64_t choices_stride, int64_t num_rows, int64_t vocab_size,
                   int32_t num_threads);
void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call);
void pagoda_run_layers(const pagoda::LayersCall* call);
void pagoda_sample(const pagoda::SampleCall* call);
}

namespace pagoda {
namespace {

constexpr int kLeastHalved = 32;  // sequences; of less, the weights that both halves read take too long

// Of some sequences, to which `call` is cut.
class Steps {
 public:
  Steps(const StepsCall& call, const StepsCall& all)
      : call_(call),
        all_(all),
        layers_(*call.layers),
        num_tokens_(layers_.num_tokens),
        stride_(all.layers->num_tokens),
        hidden_size_(call.lm_head->num_inputs),
        half_(layers_.shape->head_dim / 2) {}

  void run(int begin, int end) const {
    for (int step = begin; step < end; ++step) {
      if (step) grow();
      const int64_t* before = call_.choices + step * 2 * stride_;
      for (int64_t i = 0; i < num_tokens_; ++i) enter(i, before[i] * before[stride_ + i]);
      pagoda_run_layers(&layers_);
      choose(step, before + stride_, call_.choices + (step + 1) * 2 * stride_);
    }
  }

 private:
  // By one token each.
  void grow() const {
    for (int64_t i = 0; i < num_tokens_; ++i) ++call_.context_lens[i];
    for (int item = 0; item < call_.num_items; ++item) {
      const bool is_last = item + 1 == call_.num_items || call_.item_seqs[item + 1] != call_.item_seqs[item];
      call_.kv_ends[item] += is_last;
    }
  }

  // Sequence i's last token into the step.
  void enter(int64_t i, int64_t token_id) const {
    const int64_t position = call_.context_lens[i] - 1, block_size = layers_.shape->block_size;
    copy_row(call_.embedding, token_id * hidden_size_, layers_.hidden, i * hidden_size_, hidden_size_);
    copy_row(call_.all_cos, position * half_, call_.cos, i * half_, half_);
    copy_row(call_.all_sin, position * half_, call_.sin, i * half_, half_);
    const int64_t block = call_.block_tables[i * call_.table_stride + position / block_size];
    call_.slot_mapping[i] = block * block_size + position % block_size;
  }

  // What follows from a choice that means nothing means nothing.
  void choose(int step, const int64_t* were_finite, int64_t* choices) const {
    if (call_.sample) {
      project(call_.logits, kWriteFloat);
      const int64_t vocab_size = call_.lm_head->num_outputs;
      pagoda_greedy(call_.logits, choices, stride_, num_tokens_, vocab_size, layers_.num_threads);
      choose_at_random(step, choices);
    } else {
      project(choices, kChoose);
    }
    for (int64_t i = 0; i < num_tokens_; ++i) choices[stride_ + i] &= were_finite[i];
  }

  // Of the step's last hidden states, what the vocabulary's product makes.
  void project(void* output, Output kind) const {
    const int64_t stride = kind == kChoose ? stride_ : call_.lm_head->num_outputs;
    const LinearCall call{layers_.hidden, call_.norm,  output,             hidden_size_, stride,
                          num_tokens_,    num_tokens_, call_.norm_epsilon, kNormed,      kind,
                          layers_.num_threads, call_.sketch};
    pagoda_linear(call_.lm_head, &call);
  }

  void choose_at_random(int step, int64_t* choices) const {
    SampleCall sample = *call_.sample;
    sample.uniforms += step * all_.sample->num_draws;
    pagoda_sample(&sample);
    for (int64_t i = 0; i < sample.num_draws; ++i) choices[sample.rows[i]] = sample.token_ids[i];
  }

  const StepsCall& call_;
  const StepsCall& all_;
  const LayersCall& layers_;
  int64_t num_tokens_;
  int64_t stride_;  // between ids of choices and whether they mean anything
  int hidden_size_, half_;
};

// How many of the first num_tokens sequences, two at least, take half of the time of all; one at least.
int64_t half_of(const StepsCall& call, int64_t num_tokens) {
  constexpr int64_t kProductsPerByte = 6;  // that take as long as reading a byte of KV
  const Layer& layer = call.layers->layers[0];
  const Shape& shape = *call.layers->shape;
  int64_t num_products = 0;
  for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
    num_products += int64_t{linear->num_inputs} * linear->num_outputs;
  }
  const int64_t token_cost = int64_t{2} * shape.num_kv_heads * shape.head_dim * sizeof(KV) * kProductsPerByte;
  const auto cost_of = [&](int64_t i) { return num_products + token_cost * call.context_lens[i]; };
  int64_t total = 0;
  for (int64_t i = 0; i < num_tokens; ++i) total += cost_of(i);
  int64_t half = 1;
  for (int64_t cost = cost_of(0); half + 1 < num_tokens && 2 * cost + cost_of(half) < total; ++half) {
    cost += cost_of(half);
  }
  return half;
}

// Steps that the first num_tokens sequences take.
//
// Products wait for the processor, attention for memory, which one core alone reads nearly as fast as two. Threads that
// share every loop do the same at a time. Two that have sequences of their own need not, wait for each other only at
// the end, and find what they made in their own caches. But both read all weights, so it takes some rows to be worth
// it.
void run_alike(const StepsCall& call, int64_t num_tokens, int begin, int end) {
  const int num_threads = call.layers->num_threads;
  // Where there are tiles, products wait for memory sooner: what halves would bring there is not measured.
  if (kHasTiles || num_threads != 2 || num_tokens < kLeastHalved) {
    const Part whole(call, 0, num_tokens, num_threads);
    return Steps(whole.call(), call).run(begin, end);
  }
  const int64_t middle = half_of(call, num_tokens);
  const Part first(call, 0, middle, 1), second(call, middle, num_tokens, 1);
  for_units(2, 2, [&](int64_t half) { Steps((half ? second : first).call(), call).run(begin, end); });
}

void run_steps(const StepsCall& call) {
  int64_t num_tokens = call.layers->num_tokens;
  for (int step = 0; step < call.num_steps;) {
    while (call.steps_each[num_tokens - 1] <= step) --num_tokens;
    const int end = std::min<int64_t>(call.steps_each[num_tokens - 1], call.num_steps);
    run_alike(call, num_tokens, step, end);
    step = end;
  }
}

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_run_steps(const pagoda::StepsCall* call) { pagoda::run_steps(*call); }

#pragma GCC visibility pop
