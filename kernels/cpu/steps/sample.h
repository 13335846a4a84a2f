// What the C function of sample.cpp takes; `binding.py` mirrors it field by field.
#pragma once

#include <cstdint>

namespace pagoda {

struct SampleCall {
  const float* logits;    // [num_rows, vocab_size]
  const int64_t* rows;    // [num_draws], as all that follow
  const float* temperatures;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const double* uniforms;
  int64_t* token_ids;
  int64_t num_draws;
  int64_t vocab_size;
  int32_t num_threads;
};

}  // namespace pagoda
