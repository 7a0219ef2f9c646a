// One call of a layer, in phases over the workers of its pool.
#pragma once

#include <atomic>
#include <cstdint>

#include "moe/layer.h"
#include "moe/routing.h"

namespace kt {

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
  void gate_up();
  void quantize_intermediate(int worker, int workers);
  void down();

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
  std::atomic<int64_t> next_gate_up_{0};
  std::atomic<int64_t> next_down_{0};
};

}  // namespace kt
