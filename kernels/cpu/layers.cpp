// All layers of a step in one call: between two small products, Python would take longer than the products.
//
// Owns the order of operations, the same as `kernels.layers`.
#include "layers.h"

#include "tiles.h"

extern "C" {
void pagoda_linear(const pagoda::Linear* linear, const pagoda::LinearCall* call);
void pagoda_rotate_and_write(const pagoda::Shape* shape, const pagoda::RotateCall* call);
void pagoda_attend(const pagoda::Shape* shape, const pagoda::Work* work, const pagoda::Call* call);
}

namespace pagoda {
namespace {

struct Rows {
  void* first;
  int64_t stride;  // elements
};

class Step {
 public:
  explicit Step(const LayersCall& call)
      : call_(call),
        hidden_{call.hidden, call.layers[0].qkv.num_inputs},
        heads_{call.heads, call.layers[0].qkv.num_outputs},
        attended_{call.attended, call.layers[0].o.num_inputs},
        gated_{call.gated, call.layers[0].down.num_inputs},
        readable_rows_(rows_of_tiles(call.num_tokens)) {}

  void run(const Layer& layer) const {
    multiply(layer.qkv, kNormed, hidden_, kWrite, heads_, layer.input_norm, layer.norm_epsilon);
    attend(layer);
    multiply(layer.o, kPlain, attended_, kAdd, hidden_);
    multiply(layer.gate_up, kNormed, hidden_, kWriteGated, gated_, layer.post_norm, layer.norm_epsilon);
    multiply(layer.down, kPlain, gated_, kAdd, hidden_);
  }

 private:
  void multiply(const Linear& linear, Input input, Rows from, Output output, Rows to, const void* norm = nullptr,
                float epsilon = 0.0f) const {
    const LinearCall call{from.first,       norm,           to.first, from.stride, to.stride,
                          call_.num_tokens, readable_rows_, epsilon,  input,       output,
                          call_.num_threads};
    pagoda_linear(&linear, &call);
  }

  void attend(const Layer& layer) const {
    const RotateCall rotate{heads_.first, call_.cos,         call_.sin,         layer.query_norm,
                            layer.key_norm, layer.keys,      layer.values,      call_.slot_mapping,
                            heads_.stride, call_.num_tokens, layer.head_norm_epsilon, call_.num_threads};
    pagoda_rotate_and_write(call_.shape, &rotate);
    const WindowWork& window = call_.windows[layer.window];
    const Call call{heads_.first,        layer.keys,           layer.values,  attended_.first,
                    window.partial_sums, window.partial_norms, heads_.stride};
    pagoda_attend(call_.shape, window.work, &call);
  }

  const LayersCall& call_;
  Rows hidden_, heads_, attended_, gated_;
  int64_t readable_rows_;  // of plain inputs
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_run_layers(const pagoda::LayersCall* call) {
  const pagoda::Step step(*call);
  for (int i = 0; i < call->num_layers; ++i) step.run(call->layers[i]);
}

#pragma GCC visibility pop
