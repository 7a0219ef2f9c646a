#include "moe/layer_job.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <tuple>
#include <utility>

namespace kt {
namespace {

// Panels that one down task sums over all experts: kernels take two at a time, and hidden sizes are
// multiples of 64.
constexpr int64_t kDownPanels = 2;

// Workers read more than this from the caller's memory, if they can do so at once; less is copied
// sooner than workers are woken and waited for.
constexpr size_t kCopiedInputs = size_t{1} << 20;

// Distance of rows in scratch memory, in bytes and in floats: an odd number of cache lines more
// than the row, since rows a multiple of 4 KiB apart would all lie in the same set of the cache.
int64_t row_stride(int64_t width, const Kernels& kernels) {
  return width * kernels.activation_bytes + kRowTailBytes + 64;
}
int64_t float_stride(int64_t width) { return width + 16; }

// The part of [0, items) of one worker of a group; parts differ by at most one item.
std::pair<int64_t, int64_t> share(int64_t items, const Worker& worker) {
  return {items * worker.rank / worker.group_size, items * (worker.rank + 1) / worker.group_size};
}

void fill(std::vector<std::atomic<int32_t>>& counters, size_t first, size_t count, int64_t value) {
  for (size_t i = first; i < first + count; ++i)
    counters[i].store(static_cast<int32_t>(value), std::memory_order_relaxed);
}

// At least `count` counters; std::vector cannot grow with atomics in it.
void reserve(std::vector<std::atomic<int32_t>>& counters, size_t count) {
  if (counters.size() < count) counters = std::vector<std::atomic<int32_t>>(count);
}

}  // namespace

LayerJob::LayerJob(Layer& layer, Engine& engine, const CallInputs& inputs, const Slots& slots,
                   CallOutput output)
    : layer_(layer),
      engine_(engine),
      kernels_(engine.kernels),
      config_(layer.config()),
      dtype_(inputs.dtype),
      tokens_(inputs.tokens),
      x_(inputs.x),
      output_(std::move(output)),
      memory_(engine.take_memory()),
      routing_(memory_->routing) {
  group_by_expert(inputs.ids, inputs.weights, tokens_, config_.top_k, slots, layer.on_gpu(),
                  config_.num_experts, routing_);
  bad_ = routing_.bad;
  const size_t experts = routing_.experts.size(), slices = layer.slices().size();
  const auto column_groups =
      static_cast<size_t>(layer.layout(Projection::kDown).panels() / kDownPanels);
  reserve(memory_->slices_left, column_groups);
  fill(memory_->slices_left, 0, column_groups, static_cast<int64_t>(slices));
  for (CallMemory::SliceProgress& progress : memory_->progress) {
    progress.gate_up.reset();
    progress.down.reset();
  }
  if (!few_tokens()) {
    readers_ = static_cast<uint32_t>(engine.pool.size());
    return;
  }
  reserve(memory_->panels_left, slices * experts);
  for (size_t s = 0; s < slices; ++s)
    fill(memory_->panels_left, s * experts, experts,
         layer.slices()[s].layout(Projection::kGate).panels());
  one_row_ = tokens_ == 1 && routing_.pairs() == static_cast<int64_t>(experts);
  const auto rows = static_cast<size_t>((one_row_ ? 1 : routing_.pairs()) + kRowPadding);
  memory_->x.reserve(rows * static_cast<size_t>(row_stride(config_.hidden_size, kernels_)));
  memory_->x_scales.reserve(rows * sizeof(RowScale));
  for (int64_t t = 0; t < tokens_; ++t)
    quantize_input(t, memory_->x.data(), memory_->x_scales.as<RowScale>());
}

LayerJob::~LayerJob() {
  if (memory_) engine_.give_memory(std::move(memory_));  // it was never submitted
}

void LayerJob::submit(const std::shared_ptr<LayerJob>& job, bool kept) {
  Engine& engine = job->engine_;
  const std::lock_guard lock(engine.submission);
  if (!kept && (!engine.pool.idle() || job->input_bytes() <= kCopiedInputs)) job->copy_inputs();
  if (!job->fits_scratch()) {
    if (!engine.pool.drain(job.get())) return;
    job->grow_scratch();
  }
  job->submitted_ = Clock::now();
  engine.pool.submit(job);
}

void LayerJob::finish() noexcept {
  layer_.count_tokens(routing_);
  CallTotals totals;
  totals.tokens = tokens_;
  totals.experts = static_cast<int64_t>(routing_.experts.size());
  totals.prepare_ns = std::chrono::nanoseconds(submitted_ - started_).count();
  engine_.add_to_totals(totals, submitted_);
  output_.before.reset();
  engine_.give_memory(std::move(memory_));
}

size_t LayerJob::input_bytes() const {
  return static_cast<size_t>(tokens_) * layer_.row_bytes(dtype_);
}

void LayerJob::copy_inputs() {
  if (readers_ == 0) return;
  memory_->x.reserve(input_bytes());
  std::memcpy(memory_->x.data(), x_, input_bytes());
  x_ = memory_->x.data();
  readers_ = 0;
}

void LayerJob::wait_for_inputs() const {
  for (uint32_t left = readers_; left != 0; left = readers_) wait_changed(readers_, left);
}

template <class F>
void LayerJob::each_scratch(F f) const {
  const auto pairs = static_cast<size_t>(routing_.pairs());
  const size_t rows = pairs + kRowPadding;
  for (size_t s = 0; s < layer_.slices().size(); ++s) {
    Scratch& scratch = engine_.scratch[s];
    const int64_t width = layer_.slices()[s].width();
    if (!few_tokens()) {
      f(scratch.x_q, rows * static_cast<size_t>(row_stride(config_.hidden_size, kernels_)));
      f(scratch.x_scales, rows * sizeof(RowScale));
    }
    f(scratch.h, pairs * static_cast<size_t>(float_stride(width)) * sizeof(float));
    f(scratch.h_q, rows * static_cast<size_t>(row_stride(width, kernels_)));
    f(scratch.h_scales, rows * sizeof(RowScale));
    f(scratch.out,
      static_cast<size_t>(tokens_ * float_stride(config_.hidden_size)) * sizeof(float));
    f(scratch.workspace, static_cast<size_t>(engine_.pool.size() * kernels_.workspace_bytes));
  }
}

uint8_t* LayerJob::workspace(size_t slice, const Worker& worker) const {
  return engine_.scratch[slice].workspace.data() + worker.index * kernels_.workspace_bytes;
}

bool LayerJob::fits_scratch() const {
  bool fits = true;
  each_scratch([&](const Buffer& buffer, size_t bytes) { fits = fits && bytes <= buffer.bytes(); });
  return fits;
}

void LayerJob::grow_scratch() {
  each_scratch([](Buffer& buffer, size_t bytes) { buffer.reserve(bytes); });
}

Rows LayerJob::inputs(size_t slice, size_t group) const {
  const Scratch& scratch = engine_.scratch[slice];
  const Buffer& x_q = few_tokens() ? memory_->x : scratch.x_q;
  const Buffer& x_scales = few_tokens() ? memory_->x_scales : scratch.x_scales;
  const int64_t first = one_row_ ? 0 : routing_.begin[group];
  const int64_t stride = row_stride(config_.hidden_size, kernels_);
  return {x_q.data() + first * stride, stride, x_scales.as<RowScale>() + first};
}

Rows LayerJob::intermediate(size_t slice, int64_t first) const {
  const Scratch& scratch = engine_.scratch[slice];
  const int64_t stride = row_stride(layer_.slices()[slice].width(), kernels_);
  return {scratch.h_q.data() + first * stride, stride, scratch.h_scales.as<RowScale>() + first};
}

float* LayerJob::sums(size_t slice, int64_t row) const {
  return engine_.scratch[slice].out.as<float>() + row * float_stride(config_.hidden_size);
}

void LayerJob::run(int phase, const Worker& worker) {
  // Whatever happens to this worker, the submitter is not left waiting for it.
  struct Reader {
    std::atomic<uint32_t>& left;
    bool counts;
    ~Reader() {
      if (counts && --left == 0) left.notify_all();
    }
  } reader{readers_, phase == 0 && readers_ > 0};
  // Jobs run in their order, so it has ended; this throws if it has not ended well.
  if (phase == 0 && output_.before) WorkerPool::wait(*output_.before->job);
  const size_t slices = layer_.slices().size();
  for (auto s = static_cast<size_t>(worker.group); s < slices;
       s += static_cast<size_t>(worker.groups)) {
    switch (few_tokens() ? 2 * phase + 1 : phase) {
      case 0:
        quantize_inputs(s, worker);
        break;
      case 1:
        gate_up(s, worker);
        break;
      case 2: {
        const auto [begin, end] = share(routing_.pairs(), worker);
        quantize_intermediate(s, begin, end);
        break;
      }
      case 3:
        down(s, worker);
        break;
    }
  }
}

// The token goes into the row of its first pair, and a copy into those of the others: kernels then
// find the rows of an expert one after the other.
void LayerJob::quantize_input(int64_t token, uint8_t* rows, RowScale* scales) const {
  const int64_t width = config_.hidden_size, stride = row_stride(width, kernels_);
  int64_t first = -1;
  for (int64_t slot = token * config_.top_k; slot < (token + 1) * config_.top_k; ++slot) {
    const int64_t pair = one_row_ ? 0 : routing_.pairs_of_token[static_cast<size_t>(slot)];
    if (pair < 0) continue;
    uint8_t* q = rows + pair * stride;
    if (first >= 0) {
      const int64_t tail = scales[first].outlier_steps > 0 ? kRowTailBytes : 0;
      std::memcpy(q, rows + first * stride,
                  static_cast<size_t>(width * kernels_.activation_bytes + tail));
      scales[pair] = scales[first];
      continue;
    }
    if (dtype_ == ActivationDtype::kBf16) {
      kernels_.quantize_bf16(static_cast<const uint16_t*>(x_) + token * width, width, q,
                             scales + pair);
    } else {
      kernels_.quantize_f32(static_cast<const float*>(x_) + token * width, width, q, scales + pair);
    }
    if (one_row_) return;
    first = pair;
  }
}

// Every slice has quantised inputs of its own: the same work on each node costs less than reading
// them from another.
void LayerJob::quantize_inputs(size_t slice, const Worker& worker) {
  const Scratch& scratch = engine_.scratch[slice];
  engine_.pool.in_memory_of_waiters(*this, worker, [&] {
    const auto [begin, end] = share(tokens_, worker);
    for (int64_t t = begin; t < end; ++t)
      quantize_input(t, scratch.x_q.data(), scratch.x_scales.as<RowScale>());
  });
}

// Tasks are (expert, panel) in memory order. A free thread takes a run of them, long at first and
// short at the end: long runs are long streams from memory, short ones even out uneven experts and
// disturbed threads.
void LayerJob::gate_up(size_t slice, const Worker& worker) {
  const Slice& part = layer_.slices()[slice];
  const auto kernel = kernels_.expert[static_cast<size_t>(config_.method)].gate_up;
  const int64_t panels = part.layout(Projection::kGate).panels();
  const auto experts = static_cast<int64_t>(routing_.experts.size());
  GuidedCounter& next = memory_->progress[slice].gate_up;
  for (auto [task, end] = next.take(experts * panels, worker.group_size); task < end;
       std::tie(task, end) = next.take(experts * panels, worker.group_size)) {
    while (task < end) {
      const auto group = static_cast<size_t>(task / panels);
      const int64_t first = routing_.begin[group];
      GateUpTask t;
      t.gate = part.matrix(routing_.experts[group], Projection::kGate);
      t.up = part.matrix(routing_.experts[group], Projection::kUp);
      t.tables = layer_.tables();
      t.x = inputs(slice, group);
      t.count = routing_.begin[group + 1] - first;
      t.h_stride = float_stride(part.width());
      t.h = engine_.scratch[slice].h.as<float>() + first * t.h_stride;
      t.workspace = workspace(slice, worker);
      t.panel = task % panels;
      t.panels = std::min(panels - t.panel, end - task);
      kernel(t);
      task += t.panels;
      if (!few_tokens()) continue;
      const auto done = static_cast<int32_t>(t.panels);
      if (memory_->panels_left[slice * static_cast<size_t>(experts) + group].fetch_sub(
              done, std::memory_order_acq_rel) == done)
        quantize_intermediate(slice, first, first + t.count);
    }
  }
}

// A row has a scale in each slice, so slices need not know each other's largest value.
void LayerJob::quantize_intermediate(size_t slice, int64_t begin, int64_t end) {
  const Scratch& scratch = engine_.scratch[slice];
  const int64_t width = layer_.slices()[slice].width();
  for (int64_t i = begin; i < end; ++i)
    kernels_.quantize_f32(scratch.h.as<float>() + i * float_stride(width), width,
                          scratch.h_q.data() + i * row_stride(width, kernels_),
                          scratch.h_scales.as<RowScale>() + i);
}

// A task is a group of hidden columns over all experts, in ascending order: each output is summed
// by one thread in one order, so the result does not depend on the number of threads. Whoever is
// the last of the slices to finish a group of columns adds them up, in the order of slices.
void LayerJob::down(size_t slice, const Worker& worker) {
  const Slice& part = layer_.slices()[slice];
  const auto kernel = kernels_.expert[static_cast<size_t>(config_.method)].down;
  const int64_t tasks = part.layout(Projection::kDown).panels() / kDownPanels;
  GuidedCounter& next = memory_->progress[slice].down;
  for (auto [task, end] = next.take(tasks, worker.group_size); task < end;
       std::tie(task, end) = next.take(tasks, worker.group_size)) {
    DownTask t;
    t.panel = task * kDownPanels;
    t.panels = end * kDownPanels - t.panel;
    t.out = sums(slice, 0);
    t.out_stride = float_stride(config_.hidden_size);
    t.tables = layer_.tables();
    t.workspace = workspace(slice, worker);
    for (int64_t row = 0; row < tokens_; ++row)
      std::fill_n(sums(slice, row) + t.panel * kPanelRows, t.panels * kPanelRows, 0.0f);
    for (size_t group = 0; group < routing_.experts.size(); ++group) {
      const int64_t first = routing_.begin[group];
      t.down = part.matrix(routing_.experts[group], Projection::kDown);
      t.h = intermediate(slice, first);
      t.tokens = routing_.tokens.data() + first;
      t.weights = routing_.weights.data() + first;
      t.count = routing_.begin[group + 1] - first;
      kernel(t);
    }
    int64_t complete = task;  // [complete, task) are the last of their slices
    for (; task < end; ++task) {
      if (memory_->slices_left[static_cast<size_t>(task)].fetch_sub(1, std::memory_order_acq_rel) ==
          1)
        continue;
      write_columns(complete, task, worker);
      complete = task + 1;
    }
    write_columns(complete, end, worker);
  }
}

// The sum over slices of the column groups [begin, end), and what the layer before has left for
// them, to the output in its dtype.
void LayerJob::write_columns(int64_t begin, int64_t end, const Worker& worker) {
  const int64_t column = begin * kDownPanels * kPanelRows;
  const int64_t columns = end * kDownPanels * kPanelRows - column;
  if (columns <= 0) return;
  const auto write = [&](int64_t row) {
    float* const sum = sums(0, row) + column;
    for (size_t slice = 1; slice < layer_.slices().size(); ++slice) {
      const float* const more = sums(slice, row) + column;
      for (int64_t i = 0; i < columns; ++i) sum[i] += more[i];
    }
    const int64_t to = row * config_.hidden_size + column;
    if (output_.before) {
      const float* const more = reinterpret_cast<const float*>(output_.before->sums.get()) + to;
      for (int64_t i = 0; i < columns; ++i) sum[i] += more[i];
    }
    if (output_.dtype == ActivationDtype::kBf16) {
      kernels_.store_bf16(sum, columns, static_cast<uint16_t*>(output_.rows.get()) + to);
    } else {
      std::copy_n(sum, columns, static_cast<float*>(output_.rows.get()) + to);
    }
  };
  engine_.pool.in_memory_of_waiters(*this, worker, [&] {
    for (int64_t row = 0; row < tokens_; ++row) write(row);
  });
}

}  // namespace kt
