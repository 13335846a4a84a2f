// What the C functions of linear.cpp take; `binding.py` mirrors it field by field.
#pragma once

#include <cstdint>

namespace pagoda {

// y = x W^T + b. W is packed in panels of outputs, [num_panels][depth / kGroup][kColumns][kGroup] (see panels.h),
// filled up with zeros. One that is packed as gated has gates in the first half of each panel, and in the second what
// they open.
struct Linear {
  const void* weight;
  const void* bias;  // [num_outputs] of Element, or null
  int32_t num_inputs;
  int32_t num_outputs;
};

// What x is made from.
enum Input : int32_t {
  kPlain = 0,
  kNormed = 1,  // the root mean square norm of a row of num_inputs
};

enum Output : int32_t {
  kWrite = 0,
  kAdd = 1,
  kWriteFloat = 2,
  kWriteGated = 3,  // SiLU of the first half of y, times the second; W was packed as gated
  kChoose = 4,      // of each row the highest output's index, and whether all of them are finite (1 or 0)
};

struct Sketch;

// Rows are `stride` elements apart.
struct LinearCall {
  const void* input;        // [num_rows, num_inputs]
  const void* norm_weight;  // [num_inputs]; kNormed
  void* output;             // [num_rows, num_outputs], float32 for kWriteFloat; [num_rows, num_outputs / 2] for
                            // kWriteGated; [2, output_stride] int64 for kChoose
  int64_t input_stride;
  int64_t output_stride;
  int64_t num_rows;
  int64_t readable_rows;  // of the input, num_rows at least: a plain one with whole tiles of rows need not be copied
  float norm_epsilon;
  int32_t input_kind;   // Input
  int32_t output_kind;  // Output
  int32_t num_threads;
  const Sketch* sketch;  // of a W without bias, for kChoose; or null
};

}  // namespace pagoda
