// One call of a layer, in phases over the workers of its engine.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

#include "moe/layer.h"

namespace kt {

class LayerJob : public Job {
 public:
  // Copies the routing and, if they are few, the inputs; see Layer::submit. `x` must stay until
  // wait_for_inputs returns.
  LayerJob(Layer& layer, Engine& engine, const CallInputs& inputs, const Slots& slots,
           CallOutput output);

  ~LayerJob() override;

  // Queues a call once the scratch memory suffices for it, unless it is abandoned before.
  // `kept`: its inputs stay until it has ended, and are never copied.
  static void submit(const std::shared_ptr<LayerJob>& job, bool kept);

  // The first expert id that is none; its slot is left out.
  const std::optional<BadId>& bad_id() const { return bad_; }

  // Many tokens: inputs to int8 | gate and up | intermediate rows to int8 | down and the sum over
  // slices. Few: whoever submits quantises the inputs and whoever finishes an expert quantises its
  // intermediate rows, so only gate and up | down are left.
  int phases() const override { return few_tokens() ? 2 : 4; }
  void run(int phase, const Worker& worker) override;
  void finish() noexcept override;

  // Waits until the workers have read the caller's inputs.
  void wait_for_inputs() const;

 private:
  using Clock = std::chrono::steady_clock;

  static constexpr int64_t kFewTokens = 8;
  bool few_tokens() const { return tokens_ <= kFewTokens; }

  // Takes a copy of the inputs, so that nobody has to wait for the workers to read them.
  void copy_inputs();
  size_t input_bytes() const;

  // Whether the engine's scratch is large enough for this call, and making it so. Growing moves
  // memory that a running job may be using: the pool must be idle.
  bool fits_scratch() const;
  void grow_scratch();

  void quantize_input(int64_t token, uint8_t* rows, RowScale* scales) const;
  void quantize_inputs(size_t slice, const Worker& worker);
  void gate_up(size_t slice, const Worker& worker);
  void quantize_intermediate(size_t slice, int64_t begin, int64_t end);
  void down(size_t slice, const Worker& worker);
  void write_columns(int64_t begin, int64_t end, const Worker& worker);

  // The quantised inputs of a group of pairs, one expert's.
  Rows inputs(size_t slice, size_t group) const;
  Rows intermediate(size_t slice, int64_t first) const;
  float* sums(size_t slice, int64_t row) const;

  // A worker's memory for its kernels.
  uint8_t* workspace(size_t slice, const Worker& worker) const;

  // Calls f(buffer, bytes needed) for every scratch buffer.
  template <class F>
  void each_scratch(F f) const;

  const Clock::time_point started_ = Clock::now();
  Clock::time_point submitted_ = started_;  // the workers' time counts from here
  Layer& layer_;
  Engine& engine_;
  const Kernels& kernels_;
  const LayerConfig& config_;
  const ActivationDtype dtype_;
  const int64_t tokens_;
  const void* x_;
  CallOutput output_;
  std::unique_ptr<CallMemory> memory_;
  Routing& routing_;  // in memory_
  std::optional<BadId> bad_;
  bool one_row_ = false;              // of input, which all experts share
  std::atomic<uint32_t> readers_{0};  // workers that have yet to read the caller's inputs
};

}  // namespace kt
