#include "moe/layer_job.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace kt {
namespace {

// The least number of panels that one down task sums over all experts: two are the kernel's
// register block.
constexpr int64_t kDownPanels = 2;

size_t element_bytes(ActivationDtype dtype) { return dtype == ActivationDtype::kBf16 ? 2 : 4; }

// Distance of rows in scratch memory, in bytes and in floats: a cache line more than the row, since
// rows a multiple of 4 KiB apart would all lie in the same set of the cache.
int64_t row_stride(int64_t width, const Kernels& kernels) {
  return width * kernels.activation_bytes + 64;
}
int64_t float_stride(int64_t width) { return width + 16; }

// The part of [0, items) of one worker; parts differ by at most one item.
std::pair<int64_t, int64_t> share(int64_t items, int worker, int workers) {
  return {items * worker / workers, items * (worker + 1) / workers};
}

}  // namespace

LayerJob::LayerJob(const Layer& layer, const void* x, ActivationDtype dtype, int64_t tokens,
                   const int32_t* ids, const float* weights, const uint8_t* on_gpu, void* out)
    : layer_(layer),
      engine_(layer.engine_),
      kernels_(engine_->kernels),
      scratch_(engine_->scratch),
      dtype_(dtype),
      tokens_(tokens),
      out_(out) {
  const LayerConfig& c = layer.config();
  group_by_expert(ids, weights, tokens, c.top_k, on_gpu, c.num_experts, routing_);
  const size_t bytes = static_cast<size_t>(tokens * c.hidden_size) * element_bytes(dtype);
  x_ = engine_->take_buffer(bytes);
  std::memcpy(x_.data(), x, bytes);
}

LayerJob::~LayerJob() { engine_->give_buffer(std::move(x_)); }

template <class F>
void LayerJob::each_scratch(F f) const {
  const LayerConfig& c = layer_.config();
  const auto pairs = static_cast<size_t>(routing_.pairs());
  const size_t rows = pairs + kRowPadding;
  f(scratch_.x_q, rows * static_cast<size_t>(row_stride(c.hidden_size, kernels_)));
  f(scratch_.x_scales, rows * sizeof(RowScale));
  f(scratch_.h, pairs * static_cast<size_t>(float_stride(c.intermediate_size)) * sizeof(float));
  f(scratch_.h_q, rows * static_cast<size_t>(row_stride(c.intermediate_size, kernels_)));
  f(scratch_.h_scales, rows * sizeof(RowScale));
  f(scratch_.workspace, static_cast<size_t>(engine_->pool.size() * workspace_bytes()));
  f(scratch_.out, static_cast<size_t>(tokens_ * float_stride(c.hidden_size)) * sizeof(float));
}

int64_t LayerJob::workspace_bytes() const { return kernels_.workspace_bytes; }

bool LayerJob::fits_scratch() const {
  bool fits = true;
  each_scratch([&](const Buffer& buffer, size_t bytes) { fits = fits && bytes <= buffer.bytes(); });
  return fits;
}

void LayerJob::grow_scratch() {
  each_scratch([](Buffer& buffer, size_t bytes) { buffer.reserve(bytes); });
}

void LayerJob::run(int phase, int worker, int workers) {
  switch (phase) {
    case 0:
      return quantize_inputs(worker, workers);
    case 1:
      return gate_up(worker, workers);
    case 2:
      return quantize_intermediate(worker, workers);
    case 3:
      return down(worker, workers);
  }
}

// Each token is quantised once, into the place of its first pair, and copied to the others: kernels
// then find the rows of an expert one after the other.
void LayerJob::quantize_inputs(int worker, int workers) {
  const LayerConfig& c = layer_.config();
  const int64_t stride = row_stride(c.hidden_size, kernels_);
  RowScale* scales = scratch_.x_scales.as<RowScale>();
  const auto [begin, end] = share(tokens_, worker, workers);
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = nullptr;
    const RowScale* scale = nullptr;
    for (int64_t slot = t * c.top_k; slot < (t + 1) * c.top_k; ++slot) {
      const int64_t pair = routing_.pairs_of_token[static_cast<size_t>(slot)];
      if (pair < 0) continue;
      uint8_t* q = scratch_.x_q.data() + pair * stride;
      if (row != nullptr) {
        std::memcpy(q, row, static_cast<size_t>(c.hidden_size * kernels_.activation_bytes));
        scales[pair] = *scale;
        continue;
      }
      if (dtype_ == ActivationDtype::kBf16) {
        kernels_.quantize_bf16(x_.as<uint16_t>() + t * c.hidden_size, c.hidden_size, q,
                               scales + pair);
      } else {
        kernels_.quantize_f32(x_.as<float>() + t * c.hidden_size, c.hidden_size, q, scales + pair);
      }
      row = q;
      scale = scales + pair;
    }
  }
}

// Tasks are (expert, panel) in memory order. A free thread takes a run of them, long at first and
// short at the end: long runs are long streams from memory, short ones even out uneven experts and
// disturbed threads.
void LayerJob::gate_up(int worker, int workers) {
  const LayerConfig& c = layer_.config();
  const int64_t panels = layer_.layout(Projection::kGate).panels();
  const auto run = c.method == Method::kInt4 ? kernels_.gate_up_int4 : kernels_.gate_up_int8;
  const int64_t tasks = static_cast<int64_t>(routing_.experts.size()) * panels;
  const int64_t stride = row_stride(c.hidden_size, kernels_);
  for (auto [task, end] = next_gate_up_.take(tasks, workers); task < end;
       std::tie(task, end) = next_gate_up_.take(tasks, workers)) {
    while (task < end) {
      const auto group = static_cast<size_t>(task / panels);
      const int64_t first = routing_.begin[group];
      GateUpTask t;
      t.gate = layer_.matrix(routing_.experts[group], Projection::kGate);
      t.up = layer_.matrix(routing_.experts[group], Projection::kUp);
      t.tables = layer_.tables_.data();
      t.panel = task % panels;
      t.panels = std::min(panels - t.panel, end - task);
      t.x = {scratch_.x_q.data() + first * stride, stride,
             scratch_.x_scales.as<RowScale>() + first};
      t.count = routing_.begin[group + 1] - first;
      t.h = scratch_.h.as<float>() + first * float_stride(c.intermediate_size);
      t.h_stride = float_stride(c.intermediate_size);
      t.workspace = workspace(worker);
      run(t);
      task += t.panels;
    }
  }
}

void LayerJob::quantize_intermediate(int worker, int workers) {
  const int64_t width = layer_.config().intermediate_size;
  const auto [begin, end] = share(routing_.pairs(), worker, workers);
  for (int64_t i = begin; i < end; ++i)
    kernels_.quantize_f32(scratch_.h.as<float>() + i * float_stride(width), width,
                          scratch_.h_q.data() + i * row_stride(width, kernels_),
                          scratch_.h_scales.as<RowScale>() + i);
}

// A task is a group of hidden columns over all experts, in ascending order: each output is summed
// by one thread in one order, so the result does not depend on the number of threads.
void LayerJob::down(int worker, int workers) {
  const LayerConfig& c = layer_.config();
  const int64_t panels = layer_.layout(Projection::kDown).panels();
  const auto run = c.method == Method::kInt4 ? kernels_.down_int4 : kernels_.down_int8;
  const int64_t tasks = (panels + kDownPanels - 1) / kDownPanels;
  float* sums = scratch_.out.as<float>();
  const int64_t sums_stride = float_stride(c.hidden_size);
  for (auto [task, end] = next_down_.take(tasks, workers); task < end;
       std::tie(task, end) = next_down_.take(tasks, workers)) {
    DownTask t;
    t.panel = task * kDownPanels;
    t.panels = std::min(end * kDownPanels, panels) - t.panel;
    const int64_t column = t.panel * kPanelRows;
    const int64_t columns = t.panels * kPanelRows;
    for (int64_t row = 0; row < tokens_; ++row)
      std::fill_n(sums + row * sums_stride + column, columns, 0.0f);
    for (size_t group = 0; group < routing_.experts.size(); ++group) {
      const int64_t first = routing_.begin[group];
      t.down = layer_.matrix(routing_.experts[group], Projection::kDown);
      t.tables = layer_.tables_.data();
      const int64_t stride = row_stride(c.intermediate_size, kernels_);
      t.h = {scratch_.h_q.data() + first * stride, stride,
             scratch_.h_scales.as<RowScale>() + first};
      t.tokens = routing_.tokens.data() + first;
      t.weights = routing_.weights.data() + first;
      t.count = routing_.begin[group + 1] - first;
      t.out = sums;
      t.out_stride = sums_stride;
      t.workspace = workspace(worker);
      run(t);
    }
    for (int64_t row = 0; row < tokens_; ++row) {
      const float* from = sums + row * sums_stride + column;
      const int64_t to = row * c.hidden_size + column;
      if (dtype_ == ActivationDtype::kBf16) {
        kernels_.store_bf16(from, columns, static_cast<uint16_t*>(out_) + to);
      } else {
        std::copy_n(from, columns, static_cast<float*>(out_) + to);
      }
    }
  }
}

}  // namespace kt
