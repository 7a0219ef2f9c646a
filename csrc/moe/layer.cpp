#include "moe/layer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "moe/layer_job.h"

namespace kt {
namespace {

// Bytes of one expert's part of each tensor of a projection, by Part.
std::array<int64_t, 3> part_bytes(const ProjectionLayout& whole) {
  return {whole.codes_bytes(), whole.index_bytes(), whole.scales_bytes()};
}

void check_source(const std::vector<int64_t>& source, int64_t num_experts) {
  if (static_cast<int64_t>(source.size()) != num_experts)
    fail_argument("expert map has ", source.size(), " entries, expected ", num_experts);
  for (int64_t expert : source)
    if (expert < -1 || expert >= num_experts)
      fail_argument("expert map names expert ", expert, ", outside [0, ", num_experts, ")");
}

}  // namespace

Layer::Layer(LayerConfig config, std::shared_ptr<Engine> engine,
             std::shared_ptr<const ExpertMask> on_gpu)
    : config_(checked(config)),
      engine_(std::move(engine)),
      on_gpu_(std::move(on_gpu)),
      token_counts_(static_cast<size_t>(config_.num_experts)) {
  if (!engine_) fail_argument("a layer needs an engine");
  if (!on_gpu_) on_gpu_ = std::make_shared<ExpertMask>(static_cast<size_t>(config_.num_experts));
  if (static_cast<int64_t>(on_gpu_->on_gpu.size()) != config_.num_experts)
    fail_argument("the mask of the GPU's experts has ", on_gpu_->on_gpu.size(),
                  " entries, expected ", config_.num_experts);
  const int64_t units = config_.intermediate_size / kDimMultiple;
  const int64_t slices = std::min<int64_t>(engine_->slices(), units);
  for (int64_t s = 0; s < slices; ++s)
    slices_.emplace_back(config_, units * s / slices * kDimMultiple,
                         units * (s + 1) / slices * kDimMultiple);
}

Layer::~Layer() { engine_->pool.drain(); }

void Layer::prepare(const int8_t* tables, const std::vector<int64_t>& source) {
  check_source(source, config_.num_experts);
  loaded_ = false;  // until finish: a failure on the way leaves a mixture
  for (Slice& slice : slices_) slice.reserve();
  if (has_tables(config_.method)) {
    tables_.reserve(kNumTables * kTableLevels);
    engine_->kernels.prepare_tables(tables, tables_.data());
  }
}

void Layer::finish(const std::vector<int64_t>& source) {
  const int64_t experts = config_.num_experts - std::count(source.begin(), source.end(), -1);
  weight_bytes_ = 0;
  for (const Slice& slice : slices_) weight_bytes_ += experts * slice.slot_bytes();
  loaded_ = true;
}

void Layer::load_file(const std::string& path, const std::array<FileOffsets, 3>& offsets,
                      const int8_t* tables, const std::vector<int64_t>& source) {
  const File file(path);
  for (size_t p = 0; p < kProjections.size(); ++p) {
    const std::array<int64_t, 3> bytes = part_bytes(layout(kProjections[p]));
    for (size_t part = 0; part < bytes.size(); ++part)
      if (bytes[part] > 0) file.check_range(offsets[p][part], bytes[part] * config_.num_experts);
  }
  prepare(tables, source);
  // Slices that have yet to read a projection of an expert; the last lets go of the page cache.
  std::vector<std::atomic<int>> readers(static_cast<size_t>(config_.num_experts * 3));
  for (std::atomic<int>& left : readers) left = num_slices();
  parallel_for(engine_->pool, num_slices(), config_.num_experts * 3, [&](int s, int64_t item) {
    const int64_t slot = item / 3;
    const int64_t expert = source[static_cast<size_t>(slot)];
    if (expert < 0) return;
    const Projection projection = kProjections[static_cast<size_t>(item % 3)];
    const std::array<int64_t, 3> bytes_of = part_bytes(layout(projection));
    const auto start = [&](size_t part) {
      return offsets[static_cast<size_t>(projection)][part] + expert * bytes_of[part];
    };
    ReaderAhead reader(file);
    slices_[static_cast<size_t>(s)].for_each_run(
        slot, projection, [&](Part part, int64_t from, int64_t bytes, uint8_t* to) {
          reader.read_at(start(static_cast<size_t>(part)) + from, bytes, to);
        });
    if (--readers[static_cast<size_t>(item)] > 0) return;
    for (size_t part = 0; part < bytes_of.size(); ++part)
      if (bytes_of[part] > 0) file.drop(start(part), bytes_of[part]);
  });
  file.drop(0, 0);
  finish(source);
}

void Layer::load_matrices(const std::array<SourceMatrix, 3>& stacked,
                          const std::vector<int64_t>& source) {
  prepare(has_tables(config_.method) ? &int4_tables(config_.method)[0][0] : nullptr, source);
  // A row of down lies in all slices but has one scale, so one worker quantises all of it: the
  // memory is placed before.
  parallel_for(engine_->pool, num_slices(), config_.num_experts, [&](int s, int64_t slot) {
    if (source[static_cast<size_t>(slot)] >= 0) slices_[static_cast<size_t>(s)].touch(slot);
  });
  parallel_for(engine_->pool, num_slices(), config_.num_experts * 3, [&](int s, int64_t item) {
    const int64_t slot = item / 3;
    const int64_t expert = source[static_cast<size_t>(slot)];
    if (expert < 0 || item % num_slices() != s) return;
    const Projection projection = kProjections[static_cast<size_t>(item % 3)];
    SourceMatrix matrix = stacked[static_cast<size_t>(projection)];
    const int64_t element = matrix.dtype == SourceDtype::kFp32 ? 4 : 2;
    matrix.data = static_cast<const uint8_t*>(matrix.data) + expert * matrix.n * matrix.k * element;
    const ProjectionLayout whole = layout(projection);
    std::vector<uint8_t> codes(static_cast<size_t>(whole.codes_bytes()));
    std::vector<uint8_t> index(static_cast<size_t>(whole.index_bytes()));
    std::vector<uint16_t> scales(static_cast<size_t>(whole.n));
    quantize_projection(matrix, config_.method, engine_->kernels.quantize,
                        {codes.data(), index.data(), scales.data()});
    const std::array<const uint8_t*, 3> parts = {codes.data(), index.data(),
                                                 reinterpret_cast<const uint8_t*>(scales.data())};
    for (const Slice& slice : slices_)
      slice.for_each_run(
          slot, projection, [&](Part part, int64_t from, int64_t bytes, uint8_t* to) {
            std::memcpy(to, parts[static_cast<size_t>(part)] + from, static_cast<size_t>(bytes));
          });
  });
  finish(source);
}

std::vector<int64_t> Layer::token_counts() const {
  std::vector<int64_t> found(token_counts_.size());
  for (size_t e = 0; e < found.size(); ++e)
    found[e] = token_counts_[e].load(std::memory_order_relaxed);
  return found;
}

void Layer::count_tokens(const Routing& routing) noexcept {
  for (size_t e = 0; e < token_counts_.size(); ++e)
    if (routing.routed[e] > 0)
      token_counts_[e].fetch_add(routing.routed[e], std::memory_order_relaxed);
}

size_t Layer::row_bytes(ActivationDtype dtype) const {
  return static_cast<size_t>(config_.hidden_size) *
         (dtype == ActivationDtype::kBf16 ? sizeof(uint16_t) : sizeof(float));
}

size_t Layer::output_bytes(ActivationDtype dtype, int64_t tokens) const {
  const int64_t most = INT32_MAX / config_.top_k;
  if (tokens < 0 || tokens > most)
    fail_argument("a call of ", tokens, " tokens: expected 0 to ", most);
  return static_cast<size_t>(tokens) * row_bytes(dtype);
}

std::shared_ptr<LayerJob> Layer::make_job(const CallInputs& inputs, const Slots& slots,
                                          CallOutput output) {
  if (!loaded_) fail_runtime("the layer has no weights: call load_weights first");
  if (const Deferred* const before = output.before.get())
    if (before->tokens != inputs.tokens || before->width != config_.hidden_size)
      fail_argument("what the layer before has deferred is [", before->tokens, ", ", before->width,
                    "], expected [", inputs.tokens, ", ", config_.hidden_size, "]");
  return std::make_shared<LayerJob>(*this, *engine_, inputs, slots, std::move(output));
}

std::shared_ptr<Deferred> Layer::make_deferred(const CallInputs& inputs, const Slots& slots) {
  const auto sums =
      engine_->deferred_sums->take(output_bytes(ActivationDtype::kFp32, inputs.tokens));
  auto job = make_job(inputs, slots, {sums, ActivationDtype::kFp32, nullptr});
  return std::make_shared<Deferred>(
      Deferred{std::move(job), sums, inputs.tokens, config_.hidden_size});
}

Layer::Submitted Layer::submit(const CallInputs& inputs, CallOutput output, int64_t num_deferred) {
  std::vector<uint8_t> later;
  const bool defers =
      num_deferred > 0 && mark_deferred(inputs.ids, inputs.weights, inputs.tokens, config_.top_k,
                                        num_deferred, config_.num_experts, later);
  const auto job = make_job(inputs, {defers ? later.data() : nullptr, 0}, std::move(output));
  if (const auto& bad = job->bad_id()) fail_argument(describe(*bad, config_.num_experts));
  LayerJob::submit(job, false);
  job->wait_for_inputs();
  if (!defers) return {job, nullptr};
  const auto deferred = make_deferred(inputs, {later.data(), 1});
  LayerJob::submit(deferred->job, false);
  deferred->job->wait_for_inputs();
  return {job, deferred};
}

}  // namespace kt
