#include "stream/stream_layer.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "base/error.h"
#include "moe/layer_job.h"

namespace kt {
namespace {

constexpr size_t kAlign = 256;

size_t align(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlign - 1) / kAlign * kAlign; }

}  // namespace

// ---- what the calls share -----------------------------------------------------------------------

uint8_t* StreamContext::allocate(size_t bytes) {
  void* memory = nullptr;
  const RelaxedCapture relaxed(runtime);
  runtime.check(runtime.host_alloc(&memory, bytes, 0), "cudaHostAlloc");
  return static_cast<uint8_t*>(memory);
}

StreamContext::Pinned StreamContext::carve(const Shape& shape) {
  const size_t rows = align(shape.tokens * shape.row_bytes);
  const size_t ids = align(shape.tokens * shape.id_bytes);
  const size_t weights = align(shape.tokens * shape.top_k * 4);
  uint8_t* const memory = allocate(2 * rows + ids + weights);
  return {memory, memory + 2 * rows, memory + 2 * rows + ids, memory + rows};
}

StreamContext::Pinned StreamContext::captured(const Shape& shape, size_t set) {
  const std::lock_guard lock(mutex_);
  Pinned& pinned = captured_[{shape, set}];
  if (pinned.x == nullptr) pinned = carve(shape);
  return pinned;
}

// What was too small stays: calls on the stream may be using it.
StreamContext::Pinned StreamContext::passing(const Shape& shape, size_t set) {
  const std::lock_guard lock(mutex_);
  Shape& reserved = passing_shape_[set];
  if (reserved.tokens * reserved.row_bytes < shape.tokens * shape.row_bytes ||
      reserved.tokens * reserved.id_bytes < shape.tokens * shape.id_bytes ||
      reserved.tokens * reserved.top_k < shape.tokens * shape.top_k) {
    // At least twice as large: all that is left behind is no more than what is in use.
    reserved = {std::max(shape.tokens, 2 * reserved.tokens),
                std::max(shape.row_bytes, reserved.row_bytes),
                std::max(shape.id_bytes, reserved.id_bytes), std::max(shape.top_k, reserved.top_k)};
    passing_[set] = carve(reserved);
  }
  return passing_[set];
}

std::string StreamContext::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void StreamContext::fail(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) failure_ = reason;
}

void StreamContext::use_flags(const std::string& driver, std::chrono::milliseconds limit,
                              std::chrono::milliseconds nap) {
  if (!flags_) flags_.reset(new Flags(runtime, find_memory_ops(runtime, driver), nap));
  flags_->prove(limit);
  flags_proven_ = flags_used_ = true;
}

void StreamContext::set_flags(bool used) {
  if (used && !flags_proven_) fail_runtime("flags are not in use: expected use_flags before");
  flags_used_ = used;
}

void StreamContext::end_overdue(std::chrono::milliseconds limit) {
  std::vector<Running> overdue;
  {
    const std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    for (const Running& running : running_)
      if (now - running.since > limit) overdue.push_back(running);
  }
  const double seconds = std::chrono::duration<double>(limit).count();
  const std::string reason = concat("not finished after ", seconds, " s");
  for (const Running& running : overdue) {
    bool ended = running.layer->abandon(*running.job, reason);
    if (running.deferred) ended = running.layer->abandon(*running.deferred, reason) || ended;
    // Said here, too: a call that still waits for its turn has not come to its finish.
    if (ended) fail(concat("layer ", running.layer_idx, ": ", reason));
  }
}

// ---- one layer ----------------------------------------------------------------------------------

struct StreamLayer::Call final : Flags::Call {
  Call(std::shared_ptr<StreamContext> c, std::shared_ptr<Layer> l, int idx, const CallInputs& in,
       size_t bytes, size_t its_set, const StreamContext::Pinned& memory, bool in_graph,
       int64_t deferred, std::shared_ptr<Left> from)
      : context(std::move(c)),
        layer(std::move(l)),
        layer_idx(idx),
        inputs(in),
        out_bytes(bytes),
        set(its_set),
        pinned(memory),
        captured(in_graph),
        num_deferred(deferred),
        before(std::move(from)),
        left(deferred > 0 ? std::make_shared<Left>() : nullptr) {}

  const std::shared_ptr<StreamContext> context;
  std::shared_ptr<Layer> layer;  // null when the StreamLayer is gone; the context's mutex is its
  const int layer_idx;
  const CallInputs inputs;  // in pinned memory
  const size_t out_bytes;
  const size_t set;  // of pinned memory and of words
  const StreamContext::Pinned pinned;
  const bool captured;
  const int64_t num_deferred;
  const std::shared_ptr<Left> before, left;  // null where nothing is
  std::vector<uint8_t> later;                // marks of the slots that are deferred
  uint32_t number = 0;                       // of its flags, if it has some
  // Its place in the context's list between start and finish: moved there and back, so that
  // nothing is allocated.
  std::list<StreamContext::Running> place{1};
  std::list<StreamContext::Running>::iterator running{};  // while it is there

  void start() noexcept override;
  // Only this call's thread moves its place, so it needs no lock.
  bool ended() const noexcept override { return !place.empty() || running->job->ended(); }
  void finish() noexcept override;

  std::shared_ptr<Deferred> take_before() const;
  void leave(std::shared_ptr<Deferred> deferred) const;
  void start_deferred(Layer& its_layer) noexcept;

  // Out of the context's list, if it is there, and what it was.
  StreamContext::Running stop_running() {
    const std::lock_guard lock(context->mutex_);
    if (place.empty()) place.splice(place.end(), context->running_, running);
    return std::exchange(place.front(), {});
  }
  void fail(const std::string& reason) const {
    context->fail(concat("layer ", layer_idx, ": ", reason));
  }
};

StreamLayer::StreamLayer(std::shared_ptr<StreamContext> context, std::shared_ptr<Layer> layer,
                         int layer_idx)
    : context_(std::move(context)), layer_(std::move(layer)), layer_idx_(layer_idx) {
  if (layer_idx < 0) fail_argument("layer_idx is ", layer_idx, ": expected at least 0");
  if (context_->flags()) context_->flags_->keep_off(layer_->worker_cpus());
}

StreamLayer::~StreamLayer() {
  const std::lock_guard lock(context_->mutex_);
  for (Call* call : captured_calls_) call->layer.reset();  // not the last: layer_ is one more
}

void StreamLayer::Call::start() noexcept {
  try {
    StreamContext::Running now{nullptr, nullptr, nullptr, layer_idx, {}};
    {
      const std::lock_guard lock(context->mutex_);
      now.layer = layer;
    }
    if (!now.layer) fail_runtime("called after its deletion");
    const LayerConfig& config = now.layer->config();
    const bool defers =
        num_deferred > 0 && mark_deferred(inputs.ids, inputs.weights, inputs.tokens, config.top_k,
                                          num_deferred, config.num_experts, later);
    const Slots slots{defers ? later.data() : nullptr, 0};
    // Pinned memory stays forever and so has no owner.
    now.job = now.layer->make_job(
        inputs, slots, {{std::shared_ptr<void>(), pinned.out}, inputs.dtype, take_before()});
    now.since = std::chrono::steady_clock::now();
    if (const auto& bad = now.job->bad_id()) fail(describe(*bad, now.layer->config().num_experts));
    stop_running();  // where a replay was never finished
    {
      const std::lock_guard lock(context->mutex_);
      place.front() = now;
      running = place.begin();
      context->running_.splice(context->running_.end(), place);
    }
    LayerJob::submit(now.job, true);
    if (defers)
      start_deferred(*now.layer);
    else if (left)
      leave(nullptr);
  } catch (const std::exception& error) {
    fail(error.what());
    stop_running();  // nobody would end it
  }
}

std::shared_ptr<Deferred> StreamLayer::Call::take_before() const {
  if (!before) return nullptr;
  std::optional<std::shared_ptr<Deferred>> deferred;
  {
    const std::lock_guard lock(context->mutex_);
    deferred = std::exchange(before->deferred, std::nullopt);
  }
  if (!deferred) fail_runtime("what the layer before defers is missing");
  return *deferred;
}

void StreamLayer::Call::leave(std::shared_ptr<Deferred> deferred) const {
  const std::lock_guard lock(context->mutex_);
  left->deferred = std::move(deferred);
}

// Behind the call's own job, whose end does not depend on this: the next layer's call fails where
// it goes wrong. Inputs are copied, since they stay in pinned memory for the call's own only.
void StreamLayer::Call::start_deferred(Layer& its_layer) noexcept {
  try {
    auto deferred = its_layer.make_deferred(inputs, {later.data(), 1});
    {
      const std::lock_guard lock(context->mutex_);
      running->deferred = deferred->job;
    }
    LayerJob::submit(deferred->job, false);
    deferred->job->wait_for_inputs();
    leave(std::move(deferred));
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void StreamLayer::Call::finish() noexcept {
  bool done = false;
  StreamContext::Running now;
  {
    const std::lock_guard lock(context->mutex_);
    if (place.empty()) now = *running;
  }
  if (now.job) {
    try {
      WorkerPool::wait(*now.job);
      done = true;
    } catch (const std::exception& error) {
      fail(error.what());
    }
    stop_running();
  }
  // Every bit set is NaN in bf16 and fp32: the damage shows.
  if (!done) std::memset(pinned.out, 0xff, out_bytes);
}

// Host functions must not call CUDA, and nothing may be thrown through it.
void StreamLayer::start(void* data) { static_cast<Call*>(data)->start(); }

void StreamLayer::finish(void* data) {
  Call* const call = static_cast<Call*>(data);
  call->finish();
  if (!call->captured) delete call;
}

void StreamLayer::submit(CudaStream stream, const CallInputs& inputs, int64_t num_deferred,
                         StreamLayer* before) {
  const size_t out_bytes = layer_->output_bytes(inputs.dtype, inputs.tokens);
  const std::string failure = context_->failure();
  if (!failure.empty()) fail_runtime("an earlier call failed: ", failure);
  if (pending_ != nullptr) fail_runtime("layer ", layer_idx_, ": submit without sync before it");
  std::shared_ptr<Left> added;
  if (before != nullptr) {
    added = std::exchange(before->left_, nullptr);
    if (!added) fail_runtime("layer ", before->layer_idx_, " has deferred nothing");
  }
  const CudaRuntime& cuda = context_->runtime;
  int capture = kCaptureNone;
  cuda.check(cuda.is_capturing(stream, &capture), "cudaStreamIsCapturing");

  const int64_t top_k = layer_->config().top_k;
  const StreamContext::Shape shape{inputs.tokens,
                                   static_cast<int64_t>(layer_->row_bytes(inputs.dtype)),
                                   top_k * inputs.ids.bytes(), top_k};
  const bool captured = capture == kCaptureActive;
  const size_t set = context_->next_set();
  const StreamContext::Pinned pinned =
      captured ? context_->captured(shape, set) : context_->passing(shape, set);
  const CallInputs fetched{pinned.x, inputs.dtype, inputs.tokens,
                           ExpertIds{pinned.ids, inputs.ids.is_int64},
                           reinterpret_cast<const float*>(pinned.weights)};
  auto call = std::make_unique<Call>(context_, layer_, layer_idx_, fetched, out_bytes, set, pinned,
                                     captured, num_deferred, std::move(added));
  Flags* const flags = captured && context_->flags() ? context_->flags_.get() : nullptr;
  if (flags != nullptr) flags->begin(stream);
  const auto fetch = [&](uint8_t* to, const void* from, int64_t bytes) {
    cuda.check(cuda.memcpy_async(to, from, static_cast<size_t>(bytes), kDeviceToHost, stream),
               "cudaMemcpyAsync to the host");
  };
  fetch(pinned.x, inputs.x, static_cast<int64_t>(out_bytes));
  fetch(pinned.ids, inputs.ids.data, inputs.tokens * shape.id_bytes);
  fetch(pinned.weights, inputs.weights, inputs.tokens * top_k * 4);
  if (captured) captured_calls_.reserve(captured_calls_.size() + 1);  // nothing fails after this:
  if (flags != nullptr)
    call->number = flags->ring(stream, set, *call);
  else
    cuda.check(cuda.launch_host_func(stream, start, call.get()), "cudaLaunchHostFunc");
  context_->take_turn();
  left_ = call->left;
  pending_ = call.release();  // the stream has it; finish deletes what was not captured
  if (captured) captured_calls_.push_back(pending_);
}

void StreamLayer::wait_for(CudaStream stream, Call* call) {
  if (call->number != 0) return context_->flags_->wait(stream, call->set, call->number);
  const CudaRuntime& cuda = context_->runtime;
  cuda.check(cuda.launch_host_func(stream, finish, call), "cudaLaunchHostFunc");
}

void StreamLayer::sync(CudaStream stream, void* out) {
  Call* const call = std::exchange(pending_, nullptr);
  if (call == nullptr) fail_runtime("layer ", layer_idx_, ": sync without submit");
  const CudaRuntime& cuda = context_->runtime;
  const void* const from = call->pinned.out;
  const size_t bytes = call->out_bytes;
  // From here on the call may be gone.
  wait_for(stream, call);
  cuda.check(cuda.memcpy_async(out, from, bytes, kHostToDevice, stream),
             "cudaMemcpyAsync to the device");
}

}  // namespace kt
