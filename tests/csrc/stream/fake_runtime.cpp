// The calls of the CUDA runtime that csrc/stream uses, on threads: streams are queues that run in
// order, each on a thread of its own, with a delay before every step; a capture records steps into
// a graph and a launch replays them. Strict where CUDA is: host memory must be pinned, device
// memory allocated, host functions must not call the runtime, and memory must not be allocated
// while this thread captures, unless its capture mode is relaxed.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotPermitted = 800, kUnsafeInCapture = 900;
constexpr int kAlreadyRegistered = 712;
constexpr int kModeGlobal = 0, kModeRelaxed = 2;
enum class Kind { kHost, kDevice };

using Step = std::function<void()>;
using Graph = std::vector<Step>;

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Step> steps;
  bool busy = false, stopping = false;
  std::unique_ptr<Graph> capture;
  std::thread thread;
};

std::mutex memory_mutex;
std::map<const uint8_t*, std::pair<size_t, Kind>> blocks;
std::atomic<int> capturing{0};
std::atomic<int> longest_delay_us{0};
std::atomic<int> failing_calls{0};
std::atomic<size_t> registered{0};
std::atomic<bool> held{false};
thread_local int capture_mode = kModeGlobal;
thread_local bool in_host_function = false;

bool lies_in(const void* p, size_t bytes, Kind kind) {
  const std::lock_guard lock(memory_mutex);
  const auto* at = static_cast<const uint8_t*>(p);
  auto block = blocks.upper_bound(at);
  if (block == blocks.begin()) return false;
  --block;
  return block->second.second == kind && at + bytes <= block->first + block->second.first;
}

int allocate(void** memory, size_t bytes, Kind kind) {
  if (in_host_function) return kNotPermitted;
  if (capturing > 0 && capture_mode != kModeRelaxed) return kUnsafeInCapture;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  const std::lock_guard lock(memory_mutex);
  blocks[static_cast<uint8_t*>(*memory)] = {bytes, kind};
  return kSuccess;
}

void run(Stream& stream) {
  std::minstd_rand random(static_cast<unsigned>(reinterpret_cast<uintptr_t>(&stream)));
  std::unique_lock lock(stream.mutex);
  while (true) {
    stream.changed.wait(lock, [&] { return stream.stopping || !stream.steps.empty(); });
    if (stream.steps.empty()) return;
    const Step step = std::move(stream.steps.front());
    stream.steps.pop_front();
    stream.busy = true;
    lock.unlock();
    if (const int longest = longest_delay_us; longest > 0)
      std::this_thread::sleep_for(
          std::chrono::microseconds(random() % static_cast<unsigned>(longest)));
    step();
    lock.lock();
    stream.busy = false;
    stream.changed.notify_all();
  }
}

int add(void* handle, Step step) {
  if (in_host_function) return kNotPermitted;
  if (failing_calls > 0) {
    --failing_calls;
    return kInvalidValue;
  }
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  if (stream.capture) {
    stream.capture->push_back(std::move(step));
  } else {
    stream.steps.push_back(std::move(step));
    stream.changed.notify_all();
  }
  return kSuccess;
}

}  // namespace

extern "C" {

int cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return allocate(memory, bytes, Kind::kHost);
}

int cudaHostRegister(void* memory, size_t bytes, unsigned) {
  if (in_host_function) return kNotPermitted;
  if (failing_calls > 0) {
    --failing_calls;
    return kInvalidValue;
  }
  if (lies_in(memory, 1, Kind::kHost)) return kAlreadyRegistered;
  const std::lock_guard lock(memory_mutex);
  blocks[static_cast<uint8_t*>(memory)] = {bytes, Kind::kHost};
  registered += bytes;
  return kSuccess;
}

int cudaHostUnregister(void* memory) {
  const std::lock_guard lock(memory_mutex);
  const auto block = blocks.find(static_cast<uint8_t*>(memory));
  if (block == blocks.end()) return kInvalidValue;
  registered -= block->second.first;
  blocks.erase(block);
  return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  const bool to_host = kind == 2;
  if (!lies_in(to, bytes, to_host ? Kind::kHost : Kind::kDevice) ||
      !lies_in(from, bytes, to_host ? Kind::kDevice : Kind::kHost))
    return kInvalidValue;
  return add(stream, [=] { std::memcpy(to, from, bytes); });
}

int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  return add(stream, [=] {
    in_host_function = true;
    function(data);
    in_host_function = false;
  });
}

int cudaStreamIsCapturing(void* handle, int* status) {
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  *status = stream.capture ? 1 : 0;
  return in_host_function ? kNotPermitted : kSuccess;
}

int cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kSuccess;
}

int cudaGetLastError() { return kSuccess; }

const char* cudaGetErrorString(int error) {
  return error == kNotPermitted      ? "operation not permitted"
         : error == kUnsafeInCapture ? "operation not permitted when stream is capturing"
                                     : "invalid argument";
}

// What tests call.

size_t fake_registered() { return registered; }

void* fake_malloc(size_t bytes) {
  void* memory = nullptr;
  return allocate(&memory, bytes, Kind::kDevice) == kSuccess ? memory : nullptr;
}

void* fake_stream() {
  auto* const stream = new Stream;
  stream->thread = std::thread([stream] { run(*stream); });
  return stream;
}

void fake_synchronize(void* handle) {
  auto& stream = *static_cast<Stream*>(handle);
  std::unique_lock lock(stream.mutex);
  stream.changed.wait(lock, [&] { return stream.steps.empty() && !stream.busy; });
}

void fake_destroy(void* handle) {
  auto* const stream = static_cast<Stream*>(handle);
  {
    const std::lock_guard lock(stream->mutex);
    stream->stopping = true;
    stream->changed.notify_all();
  }
  stream->thread.join();
  delete stream;
}

// Copies between device memory and any other, and fills, in the stream's order.
void fake_copy(void* stream, void* to, const void* from, size_t bytes) {
  add(stream, [=] { std::memcpy(to, from, bytes); });
}
void fake_fill(void* stream, void* to, int byte, size_t bytes) {
  add(stream, [=] { std::memset(to, byte, bytes); });
}

void fake_begin_capture(void* handle) {
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  stream.capture = std::make_unique<Graph>();
  ++capturing;
}

void* fake_end_capture(void* handle) {
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  --capturing;
  return stream.capture.release();
}

void fake_launch(void* handle, void* graph) {
  for (const Step& step : *static_cast<Graph*>(graph)) add(handle, step);
}

// Stops a stream at this point until it is released.
void fake_hold(void* stream) {
  held = true;
  add(stream, [] { held.wait(true); });
}
void fake_release() {
  held = false;
  held.notify_all();
}

void fake_set_delay(int microseconds) { longest_delay_us = microseconds; }
void fake_fail_next(int calls) { failing_calls = calls; }
int fake_pinned_blocks() {
  const std::lock_guard lock(memory_mutex);
  return static_cast<int>(std::count_if(blocks.begin(), blocks.end(), [](const auto& block) {
    return block.second.second == Kind::kHost;
  }));
}

}  // extern "C"
