// What the C function of layers.cpp takes; `binding.py` mirrors it field by field.
#pragma once

#include "../attention/attention.h"
#include "../products/linear.h"

namespace pagoda {

// One layer: its packed matrices, its norms, its part of the KV pool.
struct Layer {
  Linear qkv, o, gate_up, down;  // gate_up was packed as gated
  const void* input_norm;  // [hidden_size], as post_norm
  const void* post_norm;
  const void* query_norm;  // [head_dim], or null, as key_norm
  const void* key_norm;
  void* keys;  // as in Call
  void* values;
  float norm_epsilon;
  float head_norm_epsilon;
  int32_t window;  // which of the step's works
};

// One step's attention with one sliding window.
struct WindowWork {
  const Work* work;
  float* partial_sums;  // as in Call
  float* partial_norms;
};

struct LayersCall {
  const Shape* shape;
  const Layer* layers;  // [num_layers]
  const WindowWork* windows;
  void* hidden;    // [num_tokens, hidden_size]: what the first layer is given, then scratch
  void* heads;     // scratch, [num_tokens up to whole tiles of 16, outputs of qkv]
  void* attended;  // scratch, likewise, inputs of o
  void* gated;     // scratch, likewise, inputs of down
  const void* cos;  // as in RotateCall
  const void* sin;
  const int64_t* slot_mapping;
  const int64_t* output_rows;  // [num_outputs], the tokens of `output`, or null: all; nothing else is made of the others
  void* output;                // [num_outputs, hidden_size], what the last layer makes; `hidden` itself where it is all
  int64_t num_tokens;
  int64_t num_outputs;
  int32_t num_layers;
  int32_t num_threads;
};

}  // namespace pagoda
