// What the C function of layers.cpp takes; `binding.py` mirrors it field by field.
#pragma once

#include "attention.h"
#include "linear.h"

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
  void* hidden;    // [num_tokens, hidden_size]: in and out
  void* heads;     // scratch, [num_tokens, outputs of qkv]
  void* attended;  // scratch, [num_tokens up to whole tiles of 16, inputs of o]
  void* gated;     // scratch, likewise, inputs of down
  const void* cos;  // as in RotateCall
  const void* sin;
  const int64_t* slot_mapping;
  int64_t num_tokens;
  int32_t num_layers;
  int32_t num_threads;
};

}  // namespace pagoda
