// One call of a layer, in phases over the workers of its pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "moe/layer.h"
#include "moe/routing.h"

namespace kt {

// Hands out [0, total) in runs of a quarter of each worker's share of what is left, at least one.
class GuidedCounter {
 public:
  // The next run [begin, end); empty when all is taken.
  std::pair<int64_t, int64_t> take(int64_t total, int workers) {
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (true) {
      const int64_t run = std::max<int64_t>(1, (total - begin) / (4 * workers));
      const int64_t end = std::min(total, begin + run);
      if (begin >= total) return {total, total};
      if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
    }
  }

 private:
  std::atomic<int64_t> next_{0};
};

class LayerJob : public Job {
 public:
  // Copies x and the routing; see Layer::submit.
  LayerJob(const Layer& layer, const void* x, ActivationDtype dtype, int64_t tokens,
           const int32_t* ids, const float* weights, const uint8_t* on_gpu, void* out);

  ~LayerJob() override;

  // Inputs to int8 | gate and up of all experts | intermediate rows to int8 | down of all experts,
  // one group of hidden columns after the other, and the output in its dtype.
  int phases() const override { return 4; }
  void run(int phase, int worker, int workers) override;

  // Whether the engine's scratch is large enough for this call, and making it so. Growing moves
  // memory that a running job may be using: the pool must be idle.
  bool fits_scratch() const;
  void grow_scratch();

 private:
  void quantize_inputs(int worker, int workers);
  void gate_up(int worker, int workers);
  void quantize_intermediate(int worker, int workers);
  void down(int worker, int workers);

  // Bytes of kernel workspace of one worker, and where one worker's is.
  int64_t workspace_bytes() const;
  uint8_t* workspace(int worker) const {
    return scratch_.workspace.data() + worker * workspace_bytes();
  }

  // Calls f(buffer, bytes needed) for every scratch buffer.
  template <class F>
  void each_scratch(F f) const;

  const Layer& layer_;
  const std::shared_ptr<Engine> engine_;  // outlives the layer for the destructor
  const Kernels& kernels_;
  Scratch& scratch_;
  const ActivationDtype dtype_;
  const int64_t tokens_;
  void* const out_;
  Buffer x_;
  Routing routing_;
  GuidedCounter next_gate_up_;
  GuidedCounter next_down_;
};

}  // namespace kt
