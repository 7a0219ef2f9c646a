// A layer's calls on a CUDA stream. Everything is put on the stream and nothing waited for, so the
// same calls may be captured into a CUDA graph and replayed:
//
//   submit: inputs to pinned memory | what hands them to the workers
//   sync:   what waits for the workers | the output to the device
//
// What a call defers is started with it and added by the workers to the next layer's output: the
// stream has no part in it.
//
// In a graph both are memory operations where the driver has them (flags.h), else, and outside of
// graphs, host functions.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <compare>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "moe/layer.h"
#include "stream/flags.h"
#include "stream/runtime.h"

namespace kt {

// What the calls of all layers share: pinned memory, and what has gone wrong. Calls follow each
// other on one stream, so they take turns with two sets of memory. Turns go by submits and not by
// the layers' indices: a model may have MoE layers at every second one.
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

  static constexpr size_t kSets = Flags::kSets;

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

  // Has calls that are captured from now on started and ended by flags, after a proof that this
  // works. Throws std::runtime_error, with a reason, where it does not: host functions do it then.
  // `nap` is for tests: the thread's, once it sleeps.
  void use_flags(const std::string& driver, std::chrono::milliseconds limit,
                 std::chrono::milliseconds nap);
  // The same again, or not; for comparing both. Throws where use_flags has not succeeded.
  void set_flags(bool used);
  bool flags() const { return flags_used_; }

  const CudaRuntime runtime;

 private:
  friend class StreamLayer;
  // A call between its start and its finish.
  struct Running {
    std::shared_ptr<Layer> layer;
    std::shared_ptr<LayerJob> job;
    std::shared_ptr<LayerJob> deferred;  // what it leaves, from before that waits for its turn
    int layer_idx = 0;
    std::chrono::steady_clock::time_point since;
  };

  // Of the next call, which takes the turn if its submit succeeds.
  size_t next_set() const { return turn_ % kSets; }
  void take_turn() { ++turn_; }

  uint8_t* allocate(size_t bytes);
  Pinned carve(const Shape& shape);

  mutable std::mutex mutex_;
  std::map<std::tuple<Shape, size_t>, Pinned> captured_;
  std::array<Shape, kSets> passing_shape_;
  std::array<Pinned, kSets> passing_;
  std::string failure_;
  std::list<Running> running_;
  std::atomic<size_t> turn_{0};
  std::atomic<bool> flags_proven_{false}, flags_used_{false};
  std::unique_ptr<Flags, Flags::EndInOwnProcess> flags_;  // last: its thread ends first
};

// The calls of one layer.
class StreamLayer {
 public:
  StreamLayer(std::shared_ptr<StreamContext> context, std::shared_ptr<Layer> layer, int layer_idx);
  // A graph that captured its calls may be replayed even then: they fail.
  ~StreamLayer();
  StreamLayer(const StreamLayer&) = delete;
  StreamLayer& operator=(const StreamLayer&) = delete;

  // Puts the start of a call on the stream, whose inputs are in device memory; up to `num_deferred`
  // of each token's experts are left to the call after it, and what the last call of `before`
  // leaves, if there is one, is added to this one's output. Throws std::runtime_error for what CUDA
  // refuses, for a call that failed earlier, and where `before` leaves nothing.
  void submit(CudaStream stream, const CallInputs& inputs, int64_t num_deferred,
              StreamLayer* before);
  // Puts the rest of it there; `out` is in device memory.
  void sync(CudaStream stream, void* out);

 private:
  struct Call;
  // From a call to the one after it, whenever they run; the context's mutex is its.
  struct Left {
    std::optional<std::shared_ptr<Deferred>> deferred;  // null where the call had none to defer
  };
  static void start(void* call);
  static void finish(void* call);
  void wait_for(CudaStream stream, Call* call);

  const std::shared_ptr<StreamContext> context_;
  const std::shared_ptr<Layer> layer_;
  const int layer_idx_;
  Call* pending_ = nullptr;
  std::shared_ptr<Left> left_;         // by the last call, until the next layer's has it
  std::vector<Call*> captured_calls_;  // graphs refer to them, so they stay forever
};

}  // namespace kt
