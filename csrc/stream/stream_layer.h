// A layer's calls on a CUDA stream. Everything is put on the stream and nothing waited for, so the
// same calls may be captured into a CUDA graph and replayed:
//
//   submit: inputs to pinned memory | a host function that hands them to the workers
//   sync:   a host function that waits for the workers | the output to the device
#pragma once

#include <array>
#include <chrono>
#include <compare>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "moe/layer.h"
#include "stream/runtime.h"

namespace kt {

// What the calls of all layers share: pinned memory, and what has gone wrong. Calls follow each
// other on one stream, so layers take turns with two sets of memory, and with two more for the
// experts that they defer: those calls end in the next layer.
class StreamContext {
 public:
  explicit StreamContext(const CudaRuntime& loaded) : runtime(loaded) {}

  // Pinned memory of one call; sizes in bytes.
  struct Pinned {
    uint8_t* x = nullptr;
    uint8_t* ids = nullptr;
    uint8_t* weights = nullptr;
    uint8_t* out = nullptr;
  };
  struct Shape {
    int64_t tokens = 0;
    int64_t row_bytes = 0;  // of x and of out
    int64_t id_bytes = 0;   // of a token's
    int64_t top_k = 0;
    auto operator<=>(const Shape&) const = default;
  };

  static constexpr size_t kSets = 4;

  // Memory that is the same for every captured call of this shape and set, forever: a graph keeps
  // its addresses. Calls that are not captured share sets that grow.
  Pinned captured(const Shape& shape, size_t set);
  Pinned passing(const Shape& shape, size_t set);

  // The first thing that went wrong, or nothing; all calls refuse from then on, since a result is
  // missing from the middle of a model's pass.
  std::string failure() const;
  void fail(const std::string& reason);

  // Ends the wait for calls that began longer ago than this, also where they wait for their turn;
  // they fail.
  void end_overdue(std::chrono::milliseconds limit);

  const CudaRuntime runtime;

 private:
  friend class StreamLayer;
  // A call between its start and its finish.
  struct Running {
    std::shared_ptr<Layer> layer;
    std::shared_ptr<LayerJob> job;
    int layer_idx = 0;
    std::chrono::steady_clock::time_point since;
  };

  uint8_t* allocate(size_t bytes);
  Pinned carve(const Shape& shape);

  mutable std::mutex mutex_;
  std::map<std::tuple<Shape, size_t>, Pinned> captured_;
  std::array<Shape, kSets> passing_shape_;
  std::array<Pinned, kSets> passing_;
  std::string failure_;
  std::list<Running> running_;
};

// The calls of one layer.
class StreamLayer {
 public:
  // `deferred`: its calls are of a layer's deferred experts, and end during the next layer's call.
  StreamLayer(std::shared_ptr<StreamContext> context, std::shared_ptr<Layer> layer, int layer_idx,
              bool deferred);
  // A graph that captured its calls may be replayed even then: they fail.
  ~StreamLayer();
  StreamLayer(const StreamLayer&) = delete;
  StreamLayer& operator=(const StreamLayer&) = delete;

  // Puts the start of a call on the stream, whose inputs are in device memory. Throws
  // std::runtime_error for what CUDA refuses, and for a call that failed earlier.
  void submit(CudaStream stream, const CallInputs& inputs);
  // Puts the rest of it there; `out` is in device memory.
  void sync(CudaStream stream, void* out);

 private:
  struct Call;
  static void start(void* call);
  static void finish(void* call);

  const std::shared_ptr<StreamContext> context_;
  const std::shared_ptr<Layer> layer_;
  const int layer_idx_;
  const size_t set_;  // of pinned memory
  Call* pending_ = nullptr;
  std::vector<Call*> captured_calls_;  // graphs refer to them, so they stay forever
};

}  // namespace kt
