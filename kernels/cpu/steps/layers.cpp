// All layers of a step in one call: between two small products, Python would take longer than the products.
//
// Owns the order of operations, the same as `kernels.layers`.
#include "layers.h"

#include "../base/rows.h"
#include "../base/tiles.h"

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
        output_{call.output, hidden_.stride} {}

  void run() const {
    for (int i = 0; i + 1 < call_.num_layers; ++i) run(call_.layers[i]);
    const Layer& last = call_.layers[call_.num_layers - 1];
    if (!call_.output_rows) return run(last);
    write_kv(last);
    if (call_.num_outputs == 0) return;
    attend(last);
    take_outputs();
    end(last, call_.num_outputs, heads_, output_);
  }

 private:
  void run(const Layer& layer) const {
    write_kv(layer);
    attend(layer);
    end(layer, call_.num_tokens, attended_, hidden_);
  }

  // What follows attention.
  void end(const Layer& layer, int64_t num_rows, Rows attended, Rows hidden) const {
    multiply(layer.o, num_rows, kPlain, attended, kAdd, hidden);
    multiply(layer.gate_up, num_rows, kNormed, hidden, kWriteGated, gated_, layer.post_norm, layer.norm_epsilon);
    multiply(layer.down, num_rows, kPlain, gated_, kAdd, hidden);
  }

  void multiply(const Linear& linear, int64_t num_rows, Input input, Rows from, Output output, Rows to,
                const void* norm = nullptr, float epsilon = 0.0f) const {
    const int64_t readable_rows = rows_of_tiles(num_rows);  // of plain inputs
    const LinearCall call{from.first, norm,          to.first, from.stride, to.stride,
                          num_rows,   readable_rows, epsilon,  input,       output,
                          call_.num_threads};
    pagoda_linear(&linear, &call);
  }

  // The outputs' rows, as far as they have come: attention, whose queries are done with, and hidden states.
  void take_outputs() const {
    for (int64_t i = 0; i < call_.num_outputs; ++i) {
      const int64_t row = call_.output_rows[i];
      copy_row(attended_.first, row * attended_.stride, heads_.first, i * heads_.stride, attended_.stride);
      copy_row(hidden_.first, row * hidden_.stride, output_.first, i * output_.stride, hidden_.stride);
    }
  }

  void write_kv(const Layer& layer) const {
    multiply(layer.qkv, call_.num_tokens, kNormed, hidden_, kWrite, heads_, layer.input_norm, layer.norm_epsilon);
    const RotateCall rotate{heads_.first, call_.cos,         call_.sin,         layer.query_norm,
                            layer.key_norm, layer.keys,      layer.values,      call_.slot_mapping,
                            heads_.stride, call_.num_tokens, layer.head_norm_epsilon, call_.num_threads};
    pagoda_rotate_and_write(call_.shape, &rotate);
  }

  void attend(const Layer& layer) const {
    const WindowWork& window = call_.windows[layer.window];
    const Call call{heads_.first,        layer.keys,           layer.values,  attended_.first,
                    window.partial_sums, window.partial_norms, heads_.stride};
    pagoda_attend(call_.shape, window.work, &call);
  }

  const LayersCall& call_;
  Rows hidden_, heads_, attended_, gated_, output_;
};

}  // namespace
}  // namespace pagoda

#pragma GCC visibility push(default)

extern "C" void pagoda_run_layers(const pagoda::LayersCall* call) {
  pagoda::Step(*call).run();
}

#pragma GCC visibility pop
