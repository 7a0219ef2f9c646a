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

// Lets this thread allocate while some stream is being captured: the allocation is no part of it.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaRuntime& runtime) : runtime_(runtime) {
    runtime_.check(runtime_.exchange_capture_mode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { runtime_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const CudaRuntime& runtime_;
  int mode_ = kCaptureModeRelaxed;  // then the one before
};

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
  const size_t routing = align(shape.tokens * shape.top_k * 4);
  uint8_t* const memory = allocate(2 * rows + 2 * routing);
  return {memory, memory + 2 * rows, memory + 2 * rows + routing, memory + rows};
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
  Shape& has = passing_shape_[set];
  if (has.tokens * has.row_bytes < shape.tokens * shape.row_bytes ||
      has.tokens * has.top_k < shape.tokens * shape.top_k) {
    // At least twice as large: all that is left behind is no more than what is in use.
    has = {std::max(shape.tokens, 2 * has.tokens), std::max(shape.row_bytes, has.row_bytes),
           std::max(shape.top_k, has.top_k)};
    passing_[set] = carve(has);
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

void StreamContext::end_overdue(std::chrono::milliseconds limit) {
  std::vector<Waiting> overdue;
  {
    const std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    for (const Waiting& waiting : waiting_)
      if (now - waiting.since > limit) overdue.push_back(waiting);
  }
  const double seconds = std::chrono::duration<double>(limit).count();
  for (const Waiting& waiting : overdue)
    WorkerPool::abandon(*waiting.job, concat("not finished after ", seconds, " s"));
}

// ---- one layer ----------------------------------------------------------------------------------

struct StreamLayer::Call {
  std::shared_ptr<StreamContext> context;
  std::shared_ptr<Layer> layer;
  int layer_idx;
  ActivationDtype dtype;
  int64_t tokens;
  size_t out_bytes;
  const uint8_t* on_gpu;
  StreamContext::Pinned pinned;
  bool captured;
  std::shared_ptr<Job> job;  // between start and finish

  void fail(const std::exception& error) {
    context->fail(concat("layer ", layer_idx, ": ", error.what()));
  }
};

StreamLayer::StreamLayer(std::shared_ptr<StreamContext> context, std::shared_ptr<Layer> layer,
                         int layer_idx, bool deferred)
    : context_(std::move(context)),
      layer_(std::move(layer)),
      layer_idx_(layer_idx),
      set_(static_cast<size_t>(layer_idx % 2 + (deferred ? 2 : 0))) {}

StreamLayer::~StreamLayer() = default;

// Host functions must not call CUDA, and nothing may be thrown through it.
void StreamLayer::start(void* data) {
  Call& call = *static_cast<Call*>(data);
  try {
    call.job = call.layer->submit_kept(
        call.pinned.x, call.dtype, call.tokens, reinterpret_cast<int32_t*>(call.pinned.ids),
        reinterpret_cast<float*>(call.pinned.weights), call.on_gpu, call.pinned.out);
  } catch (const std::exception& error) {
    call.fail(error);
  }
}

void StreamLayer::finish(void* data) {
  Call& call = *static_cast<Call*>(data);
  const std::shared_ptr<StreamContext> context = call.context;
  const std::shared_ptr<Job> job = std::move(call.job);
  bool done = false;
  if (job) {
    std::list<StreamContext::Waiting>::iterator place;
    {
      const std::lock_guard lock(context->mutex_);
      place = context->waiting_.insert(context->waiting_.end(),
                                       {job, std::chrono::steady_clock::now()});
    }
    try {
      WorkerPool::wait(*job);
      done = true;
    } catch (const std::exception& error) {
      call.fail(error);
    }
    const std::lock_guard lock(context->mutex_);
    context->waiting_.erase(place);
  }
  // Every bit set is NaN in bf16 and fp32: the damage shows.
  if (!done) std::memset(call.pinned.out, 0xff, call.out_bytes);
  if (!call.captured) delete &call;
}

void StreamLayer::submit(CudaStream stream, const void* x, ActivationDtype dtype, int64_t tokens,
                         const int32_t* ids, const float* weights, const uint8_t* on_gpu) {
  const std::string failure = context_->failure();
  if (!failure.empty()) fail_runtime("an earlier call failed: ", failure);
  if (pending_ != nullptr) fail_runtime("layer ", layer_idx_, ": submit without sync before it");
  const CudaRuntime& cuda = context_->runtime;
  int capture = kCaptureNone;
  cuda.check(cuda.is_capturing(stream, &capture), "cudaStreamIsCapturing");

  const LayerConfig& config = layer_->config();
  const int64_t element = dtype == ActivationDtype::kBf16 ? 2 : 4;
  const StreamContext::Shape shape{tokens, config.hidden_size * element, config.top_k};
  const bool captured = capture == kCaptureActive;
  auto call = std::make_unique<Call>(Call{
      context_, layer_, layer_idx_, dtype, tokens, static_cast<size_t>(tokens * shape.row_bytes),
      on_gpu, captured ? context_->captured(shape, set_) : context_->passing(shape, set_), captured,
      nullptr});
  const auto fetch = [&](uint8_t* to, const void* from, int64_t bytes) {
    cuda.check(cuda.memcpy_async(to, from, static_cast<size_t>(bytes), kDeviceToHost, stream),
               "cudaMemcpyAsync to the host");
  };
  fetch(call->pinned.x, x, tokens * shape.row_bytes);
  fetch(call->pinned.ids, ids, tokens * config.top_k * 4);
  fetch(call->pinned.weights, weights, tokens * config.top_k * 4);
  cuda.check(cuda.launch_host_func(stream, start, call.get()), "cudaLaunchHostFunc");
  pending_ = call.get();
  if (captured) {
    captured_calls_.push_back(std::move(call));
  } else {
    static_cast<void>(call.release());  // finish deletes it
  }
}

void StreamLayer::sync(CudaStream stream, void* out) {
  Call* const call = std::exchange(pending_, nullptr);
  if (call == nullptr) fail_runtime("layer ", layer_idx_, ": sync without submit");
  const CudaRuntime& cuda = context_->runtime;
  const void* const from = call->pinned.out;
  const size_t bytes = call->out_bytes;
  // From here on the call may be gone.
  cuda.check(cuda.launch_host_func(stream, finish, call), "cudaLaunchHostFunc");
  cuda.check(cuda.memcpy_async(out, from, bytes, kHostToDevice, stream),
             "cudaMemcpyAsync to the device");
}

}  // namespace kt
