#include "moe/layer_job.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

// Panels that one down task sums over all experts: two are the kernel's register block.
constexpr int64_t kDownPanels = 2;

size_t element_bytes(ActivationDtype dtype) { return dtype == ActivationDtype::kBf16 ? 2 : 4; }

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
  const auto element = static_cast<size_t>(kernels_.activation_bytes);
  const auto inputs = static_cast<size_t>(tokens_ * c.hidden_size);
  const auto hidden = static_cast<size_t>(routing_.pairs() * c.intermediate_size);
  f(scratch_.x_q, inputs * element);
  f(scratch_.x_scales, static_cast<size_t>(tokens_) * sizeof(RowScale));
  f(scratch_.h, hidden * sizeof(float));
  f(scratch_.h_q, hidden * element);
  f(scratch_.h_scales, static_cast<size_t>(routing_.pairs()) * sizeof(RowScale));
  f(scratch_.out, inputs * sizeof(float));
}

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
      return gate_up();
    case 2:
      return quantize_intermediate(worker, workers);
    case 3:
      return down();
  }
}

void LayerJob::quantize_inputs(int worker, int workers) {
  const int64_t hidden = layer_.config().hidden_size;
  const int64_t stride = hidden * kernels_.activation_bytes;
  const auto [begin, end] = share(tokens_, worker, workers);
  for (int64_t t = begin; t < end; ++t) {
    uint8_t* q = scratch_.x_q.data() + t * stride;
    RowScale* scale = scratch_.x_scales.as<RowScale>() + t;
    if (dtype_ == ActivationDtype::kBf16) {
      kernels_.quantize_bf16(x_.as<uint16_t>() + t * hidden, hidden, q, scale);
    } else {
      kernels_.quantize_f32(x_.as<float>() + t * hidden, hidden, q, scale);
    }
  }
}

// Tasks are (expert, panel), handed out in memory order: whichever thread is free takes the next,
// so that uneven experts and disturbed threads even out.
void LayerJob::gate_up() {
  const LayerConfig& c = layer_.config();
  const int64_t panels = layer_.layout(Projection::kGate).panels();
  const auto run = c.method == Method::kInt4 ? kernels_.gate_up_int4 : kernels_.gate_up_int8;
  const int64_t tasks = static_cast<int64_t>(routing_.experts.size()) * panels;
  for (int64_t task = next_gate_up_++; task < tasks; task = next_gate_up_++) {
    const auto group = static_cast<size_t>(task / panels);
    const int64_t first = routing_.begin[group];
    GateUpTask t;
    t.gate = layer_.matrix(routing_.experts[group], Projection::kGate);
    t.up = layer_.matrix(routing_.experts[group], Projection::kUp);
    t.tables = layer_.tables_.data();
    t.panel = task % panels;
    t.x = {scratch_.x_q.data(), c.hidden_size * kernels_.activation_bytes,
           scratch_.x_scales.as<RowScale>()};
    t.tokens = routing_.tokens.data() + first;
    t.count = routing_.begin[group + 1] - first;
    t.h = scratch_.h.as<float>() + first * c.intermediate_size;
    t.h_stride = c.intermediate_size;
    run(t);
  }
}

void LayerJob::quantize_intermediate(int worker, int workers) {
  const int64_t width = layer_.config().intermediate_size;
  const auto [begin, end] = share(routing_.pairs(), worker, workers);
  for (int64_t i = begin; i < end; ++i)
    kernels_.quantize_f32(scratch_.h.as<float>() + i * width, width,
                          scratch_.h_q.data() + i * width * kernels_.activation_bytes,
                          scratch_.h_scales.as<RowScale>() + i);
}

// A task is a group of hidden columns over all experts, in ascending order: each output is summed
// by one thread in one order, so the result does not depend on the number of threads.
void LayerJob::down() {
  const LayerConfig& c = layer_.config();
  const int64_t panels = layer_.layout(Projection::kDown).panels();
  const auto run = c.method == Method::kInt4 ? kernels_.down_int4 : kernels_.down_int8;
  const int64_t tasks = (panels + kDownPanels - 1) / kDownPanels;
  float* sums = scratch_.out.as<float>();
  for (int64_t task = next_down_++; task < tasks; task = next_down_++) {
    DownTask t;
    t.panel = task * kDownPanels;
    t.panels = std::min(kDownPanels, panels - t.panel);
    const int64_t column = t.panel * kPanelRows;
    const int64_t columns = t.panels * kPanelRows;
    for (int64_t row = 0; row < tokens_; ++row)
      std::fill_n(sums + row * c.hidden_size + column, columns, 0.0f);
    for (size_t group = 0; group < routing_.experts.size(); ++group) {
      const int64_t first = routing_.begin[group];
      t.down = layer_.matrix(routing_.experts[group], Projection::kDown);
      t.tables = layer_.tables_.data();
      const int64_t stride = c.intermediate_size * kernels_.activation_bytes;
      t.h = {scratch_.h_q.data() + first * stride, stride,
             scratch_.h_scales.as<RowScale>() + first};
      t.tokens = routing_.tokens.data() + first;
      t.weights = routing_.weights.data() + first;
      t.count = routing_.begin[group + 1] - first;
      t.out = sums;
      t.out_stride = c.hidden_size;
      run(t);
    }
    for (int64_t row = 0; row < tokens_; ++row) {
      const float* from = sums + row * c.hidden_size + column;
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
