// Some decode steps in one call: between two short ones, Python would take as long as either.
#include "steps.h"

#include "rows.h"

extern "C" {
void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call);
void pagoda_run_layers(const pagoda::LayersCall* call);
}

namespace pagoda {
namespace {

class Steps {
 public:
  explicit Steps(const StepsCall& call)
      : call_(call),
        layers_(*call.layers),
        num_tokens_(layers_.num_tokens),
        hidden_size_(call.lm_head->num_inputs),
        half_(layers_.shape->head_dim / 2) {}

  void run() const {
    for (int step = 0; step < call_.num_steps; ++step) {
      if (step) grow();
      const int64_t* before = call_.choices + step * 2 * num_tokens_;
      for (int64_t i = 0; i < num_tokens_; ++i) enter(i, before[i] * before[num_tokens_ + i]);
      pagoda_run_layers(&layers_);
      choose(before + num_tokens_, call_.choices + (step + 1) * 2 * num_tokens_);
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
  void choose(const int64_t* were_finite, int64_t* choices) const {
    const LinearCall call{layers_.hidden, call_.norm,  choices,            hidden_size_, num_tokens_,
                          num_tokens_,    num_tokens_, call_.norm_epsilon, kNormed,      kChoose,
                          layers_.num_threads};
    pagoda_linear(call_.lm_head, &call);
    for (int64_t i = 0; i < num_tokens_; ++i) choices[num_tokens_ + i] &= were_finite[i];
  }

  const StepsCall& call_;
  const LayersCall& layers_;
  int64_t num_tokens_;
  int hidden_size_, half_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_run_steps(const pagoda::StepsCall* call) { pagoda::Steps(*call).run(); }

#pragma GCC visibility pop
