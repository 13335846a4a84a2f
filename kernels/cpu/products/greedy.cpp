// The most likely token of each row of logits, in one pass over memory.
#include "../base/rows.h"
#include "../base/team.h"
#include "likeliest.h"

#pragma GCC visibility push(default)

// logits: [num_rows, vocab_size]; choices: token ids, and `choices_stride` after them whether all of the row is finite.
extern "C" void pagoda_greedy(const float* logits, int64_t* choices, int64_t choices_stride, int64_t num_rows,
                              int64_t vocab_size, int32_t num_threads) {
  using namespace pagoda;
  for_units(num_threads, num_rows, [=](int64_t row) {
    Likeliest likeliest;
    const float* from = logits + row * vocab_size;
    for_vectors(vocab_size, [&](int id, int count) { likeliest.take(load_some(from + id, count), id, count); });
    const Choice choice = likeliest.choice();
    choices[row] = choice.token_id;
    choices[choices_stride + row] = choice.is_finite;
  });
}

#pragma GCC visibility pop
