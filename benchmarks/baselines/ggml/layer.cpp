// One MoE layer as llama.cpp computes it: the graph of its build_moe_ffn over ggml's CPU backend,
// with the weights in the buffer type that llama.cpp would choose for them (repacked if ggml has
// such kernels for this CPU and format).

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

thread_local std::string last_error;

void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(what);
}

template <typename Function>
Function find(ggml_backend_reg_t reg, const char* name) {
  auto function = reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(reg, name));
  check(function != nullptr, name);
  return function;
}

struct ContextFree {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using Context = std::unique_ptr<ggml_context, ContextFree>;

Context new_context() {
  ggml_init_params params = {ggml_tensor_overhead() * 128 + ggml_graph_overhead(), nullptr, true};
  Context context(ggml_init(params));
  check(context != nullptr, "ggml_init failed");
  return context;
}

struct Graph {
  Context context;
  ggml_gallocr_t allocator = nullptr;
  ggml_cgraph* graph = nullptr;
  ggml_tensor *x = nullptr, *ids = nullptr, *weights = nullptr, *out = nullptr;

  ~Graph() {
    if (allocator) ggml_gallocr_free(allocator);
  }
};

}  // namespace

struct Layer {
  int64_t hidden, intermediate, experts, top_k;
  ggml_type type;
  ggml_backend_t backend = nullptr;
  ggml_backend_dev_t device = nullptr;
  ggml_backend_buffer_type_t weights_in = nullptr;
  Context context;
  ggml_tensor* matrices[3] = {};  // gate, up, down
  std::map<int64_t, std::unique_ptr<Graph>> graphs;
  std::string description;

  void start(const char* folder, int threads) {
    ggml_backend_load_all_from_path(folder);
    device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    check(device != nullptr, "none of the built ggml CPU backends runs on this CPU");
    backend = ggml_backend_dev_init(device, nullptr);
    check(backend != nullptr, "ggml's CPU backend does not start");
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    find<ggml_backend_set_n_threads_t>(reg, "ggml_backend_set_n_threads")(backend, threads);
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    auto* pool = find<decltype(&ggml_threadpool_new)>(reg, "ggml_threadpool_new")(&params);
    check(pool != nullptr, "ggml_threadpool_new failed");
    find<decltype(&ggml_backend_cpu_set_threadpool)>(reg, "ggml_backend_cpu_set_threadpool")(
        backend, pool);

    weights_in = choose_buffer_type(reg);
    context = new_context();
    matrices[0] = ggml_new_tensor_3d(context.get(), type, hidden, intermediate, experts);
    matrices[1] = ggml_new_tensor_3d(context.get(), type, hidden, intermediate, experts);
    matrices[2] = ggml_new_tensor_3d(context.get(), type, intermediate, hidden, experts);
    check(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), weights_in) != nullptr,
          "not enough memory for the weights");

    description = std::string("weights in ") + ggml_backend_buft_name(weights_in);
    auto features = find<ggml_backend_get_features_t>(reg, "ggml_backend_get_features");
    for (const ggml_backend_feature* f = features(reg); f->name; ++f) {
      description += std::string(", ") + f->name;
    }
  }

  // The first of the backend's extra buffer types that can multiply from it, as llama.cpp does.
  ggml_backend_buffer_type_t choose_buffer_type(ggml_backend_reg_t reg) {
    auto extra = find<ggml_backend_dev_get_extra_bufts_t>(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t* type_at = extra(device); type_at && *type_at; ++type_at) {
      Context scratch = new_context();
      ggml_tensor* w = ggml_new_tensor_3d(scratch.get(), type, hidden, intermediate, experts);
      ggml_tensor* x = ggml_new_tensor_3d(scratch.get(), GGML_TYPE_F32, hidden, 1, 1);
      ggml_tensor* ids = ggml_new_tensor_2d(scratch.get(), GGML_TYPE_I32, top_k, 1);
      ggml_tensor* product = ggml_mul_mat_id(scratch.get(), w, x, ids);
      ggml_backend_buffer_t empty = ggml_backend_buft_alloc_buffer(*type_at, 0);
      w->buffer = empty;
      const bool fits = ggml_backend_dev_supports_op(device, product);
      w->buffer = nullptr;
      ggml_backend_buffer_free(empty);
      if (fits) return *type_at;
    }
    return ggml_backend_dev_buffer_type(device);
  }

  Graph& graph_for(int64_t tokens) {
    std::unique_ptr<Graph>& found = graphs[tokens];
    if (found) return *found;
    auto made = std::make_unique<Graph>();
    made->context = new_context();
    ggml_context* c = made->context.get();
    made->x = ggml_new_tensor_3d(c, GGML_TYPE_F32, hidden, 1, tokens);
    made->ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, top_k, tokens);
    made->weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, top_k, tokens);
    for (ggml_tensor* input : {made->x, made->ids, made->weights}) ggml_set_input(input);
    ggml_tensor* up = ggml_mul_mat_id(c, matrices[1], made->x, made->ids);
    ggml_tensor* gate = ggml_mul_mat_id(c, matrices[0], made->x, made->ids);
    ggml_tensor* activated = ggml_swiglu_split(c, gate, up);
    ggml_tensor* down = ggml_mul_mat_id(c, matrices[2], activated, made->ids);
    down = ggml_mul(c, down, made->weights);
    ggml_tensor* sum = nullptr;
    for (int64_t k = 0; k < top_k; ++k) {
      ggml_tensor* part = ggml_view_2d(c, down, hidden, tokens, down->nb[2], k * down->nb[1]);
      sum = sum ? ggml_add(c, sum, part) : part;
    }
    made->out = top_k == 1 ? ggml_cont(c, sum) : sum;
    ggml_set_output(made->out);
    made->graph = ggml_new_graph(c);
    ggml_build_forward_expand(made->graph, made->out);
    made->allocator = ggml_gallocr_new(ggml_backend_dev_buffer_type(device));
    check(ggml_gallocr_alloc_graph(made->allocator, made->graph), "no memory for the graph");
    found = std::move(made);
    return *found;
  }
};

extern "C" {

// What the last call of this thread failed with.
const char* layer_error() { return last_error.c_str(); }

// A layer over the backends in `folder`, weights of ggml type `type`; nullptr on failure.
Layer* layer_new(const char* folder, int threads, int64_t hidden, int64_t intermediate,
                 int64_t experts, int64_t top_k, const char* type_name) {
  try {
    auto layer = std::make_unique<Layer>();
    layer->hidden = hidden;
    layer->intermediate = intermediate;
    layer->experts = experts;
    layer->top_k = top_k;
    int type = 0;
    while (type < GGML_TYPE_COUNT && strcmp(ggml_type_name(ggml_type(type)), type_name) != 0)
      ++type;
    check(type < GGML_TYPE_COUNT, "ggml has no such type");
    layer->type = ggml_type(type);
    layer->start(folder, threads);
    return layer.release();
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

const char* layer_description(const Layer* layer) { return layer->description.c_str(); }

// Bytes of `rows` rows of `columns` weights.
int64_t layer_row_bytes(const Layer* layer, int64_t rows, int64_t columns) {
  return static_cast<int64_t>(ggml_row_size(layer->type, columns)) * rows;
}

// Quantises [rows, columns] floats as llama.cpp's tools do without an importance matrix.
void layer_quantize(const Layer* layer, const float* source, void* target, int64_t rows,
                    int64_t columns) {
  ggml_quantize_chunk(layer->type, source, target, 0, rows, columns, nullptr);
}

// Sets all experts of matrix 0 (gate), 1 (up) or 2 (down); repacks them where that is faster.
void layer_set(Layer* layer, int matrix, const void* data, int64_t bytes) {
  ggml_backend_tensor_set(layer->matrices[matrix], data, 0, static_cast<size_t>(bytes));
}

// x [tokens, hidden], ids and weights [tokens, top_k] -> out [tokens, hidden]; 0, or -1 on failure.
int layer_forward(Layer* layer, int64_t tokens, const float* x, const int32_t* ids,
                  const float* weights, float* out) {
  try {
    Graph& g = layer->graph_for(tokens);
    ggml_backend_tensor_set(g.x, x, 0, ggml_nbytes(g.x));
    ggml_backend_tensor_set(g.ids, ids, 0, ggml_nbytes(g.ids));
    ggml_backend_tensor_set(g.weights, weights, 0, ggml_nbytes(g.weights));
    check(ggml_backend_graph_compute(layer->backend, g.graph) == GGML_STATUS_SUCCESS,
          "ggml_backend_graph_compute failed");
    ggml_backend_tensor_get(g.out, out, 0, ggml_nbytes(g.out));
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // extern "C"
