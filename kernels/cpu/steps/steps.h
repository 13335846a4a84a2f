// What the C function of steps.cpp takes; `binding.py` mirrors it field by field.
#pragma once

#include "layers.h"
#include "sample.h"

namespace pagoda {

// Decodes of the same sequences, one step after the other, fewer and fewer of them. Each takes the likeliest token, or
// one at random.
//
// The first step's work list serves them all: sequence i has its own last item, which grows with it, and no more items
// than at first.
struct StepsCall {
  const LayersCall* layers;  // of each step
  void* cos;                 // what `layers` has, to be filled for each step, as sin and slot_mapping
  void* sin;
  int64_t* slot_mapping;
  int32_t* kv_ends;       // of the works' items, as context_lens
  int32_t* context_lens;  // [num_tokens]
  const int32_t* item_seqs;  // [num_items]
  const int32_t* block_tables;
  const void* embedding;  // [vocabulary, hidden_size], rows
  const void* all_cos;    // [positions, head_dim / 2]
  const void* all_sin;
  const Linear* lm_head;
  const Sketch* sketch;  // of it, or null
  const void* norm;  // before it, [hidden_size]
  // [1 + num_steps, 2, num_tokens]: ids and whether they mean anything (1 or 0); the first are given, and what is not
  // chosen stays.
  int64_t* choices;
  const SampleCall* sample;  // who takes one at random; its uniforms are [num_steps, num_draws]; null where nobody does
  float* logits;             // what `sample` has, to be filled for each step
  const int64_t* steps_each;  // [num_tokens], how many each sequence takes, one at least, in descending order
  int64_t table_stride;
  int32_t num_items;
  int32_t num_steps;  // as many as the first takes, or fewer
  float norm_epsilon;
};

}  // namespace pagoda
