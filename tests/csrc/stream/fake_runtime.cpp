// The calls of the CUDA runtime and driver that csrc/stream uses, on threads: streams are queues
// that run in order, each on a thread of its own, with a delay before every step; a capture records
// steps into a graph and a launch replays them. Strict where CUDA is: host memory must be pinned,
// device memory allocated, host functions must not call the runtime, and memory must not be
// allocated while this thread captures, unless its capture mode is relaxed.

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
constexpr int kAlreadyRegistered = 712, kNotRegistered = 713;
constexpr int kNotReady = 600, kNotSupported = 801;
// Host memory lies elsewhere for the device.
constexpr uint64_t kOnDevice = uint64_t{1} << 60;
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
  uint64_t capture_id = 0;
  std::thread thread;
};

std::mutex memory_mutex;
std::map<const uint8_t*, std::pair<size_t, Kind>> blocks;
std::atomic<int> capturing{0};
std::atomic<int> longest_delay_us{0};
std::atomic<int> failing_calls{0};
std::atomic<size_t> registered{0};
std::atomic<bool> held{false};
std::atomic<uint64_t> captures{0};
std::atomic<int> host_functions{0};
// How memory operations fail: graphs do not take them, writes are lost, waits do not wait.
enum Broken { kWell, kRefused, kLostWrites, kNoWaits };
std::atomic<int> broken{kWell};
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

// With the mutex held: whether any byte is host memory that CUDA knows.
bool overlaps(const uint8_t* memory, size_t bytes) {
  return std::any_of(blocks.begin(), blocks.end(), [&](const auto& block) {
    const auto& [size, kind] = block.second;
    return kind == Kind::kHost && block.first < memory + bytes && memory < block.first + size;
  });
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

// As CUstreamBatchMemOpParams.
struct MemoryOp {
  uint32_t kind, unused;
  uint64_t address, value;
  uint32_t flags, unused_too;
  uint64_t internal[2];
};
constexpr uint32_t kWait = 1, kWrite = 2, kUntilEqual = 1;

using Word = std::atomic<uint32_t>;

bool is_word(const MemoryOp& op) {
  return (op.address & kOnDevice) != 0 && op.address % 4 == 0 &&
         lies_in(reinterpret_cast<const void*>(op.address - kOnDevice), 4, Kind::kHost);
}

void do_memory_ops(const std::vector<MemoryOp>& ops) {
  for (const MemoryOp& op : ops) {
    auto& word = *reinterpret_cast<Word*>(op.address - kOnDevice);
    const auto value = static_cast<uint32_t>(op.value);
    if (op.kind == kWrite && broken != kLostWrites) word.store(value, std::memory_order_release);
    if (op.kind == kWait && broken != kNoWaits)
      while (word.load(std::memory_order_acquire) != value)
        std::this_thread::sleep_for(std::chrono::microseconds(5));
  }
}

void begin_capture(Stream& stream) {
  const std::lock_guard lock(stream.mutex);
  stream.capture = std::make_unique<Graph>();
  stream.capture_id = ++captures;
  ++capturing;
}

Graph* end_capture(Stream& stream) {
  const std::lock_guard lock(stream.mutex);
  --capturing;
  return stream.capture.release();
}

void launch(Stream& stream, const Graph& graph) {
  for (const Step& step : graph) add(&stream, step);
}

Stream* create_stream() {
  auto* const stream = new Stream;
  stream->thread = std::thread([stream] { run(*stream); });
  return stream;
}

void destroy_stream(Stream* stream) {
  {
    const std::lock_guard lock(stream->mutex);
    stream->stopping = true;
    stream->changed.notify_all();
  }
  stream->thread.join();
  delete stream;
}

}  // namespace

extern "C" {

// Of the driver.

int cuStreamBatchMemOp_v2(void* handle, unsigned count, const MemoryOp* params, unsigned flags) {
  const std::vector<MemoryOp> ops(params, params + count);
  for (const MemoryOp& op : ops)
    if (!is_word(op) || op.flags != (op.kind == kWait ? kUntilEqual : 0) || flags != 0)
      return kInvalidValue;
  if (broken == kRefused) return kNotSupported;
  return add(handle, [ops] { do_memory_ops(ops); });
}

int cuStreamGetCaptureInfo_v2(void* handle, int* status, uint64_t* id, void**, void**, size_t*) {
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  *status = stream.capture ? 1 : 0;
  *id = stream.capture_id;
  return kSuccess;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == kNotSupported ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_INVALID_VALUE";
  return kSuccess;
}

// Of the runtime.

int cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  if (!lies_in(host, 1, Kind::kHost)) return kInvalidValue;
  *device = reinterpret_cast<void*>(reinterpret_cast<uint64_t>(host) | kOnDevice);
  return kSuccess;
}

int cudaStreamCreateWithFlags(void** stream, unsigned) {
  if (in_host_function) return kNotPermitted;
  if (capturing > 0 && capture_mode != kModeRelaxed) return kUnsafeInCapture;
  *stream = create_stream();
  return kSuccess;
}

int cudaStreamDestroy(void* stream) {
  destroy_stream(static_cast<Stream*>(stream));
  return kSuccess;
}

int cudaStreamQuery(void* handle) {
  auto& stream = *static_cast<Stream*>(handle);
  const std::lock_guard lock(stream.mutex);
  return stream.steps.empty() && !stream.busy ? kSuccess : kNotReady;
}

int cudaStreamBeginCapture(void* stream, int) {
  begin_capture(*static_cast<Stream*>(stream));
  return kSuccess;
}

int cudaStreamEndCapture(void* stream, void** graph) {
  *graph = end_capture(*static_cast<Stream*>(stream));
  return kSuccess;
}

int cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return kSuccess;
}

int cudaGraphLaunch(void* executable, void* stream) {
  launch(*static_cast<Stream*>(stream), *static_cast<Graph*>(executable));
  return kSuccess;
}

int cudaGraphExecDestroy(void* executable) {
  delete static_cast<Graph*>(executable);
  return kSuccess;
}

int cudaGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kSuccess;
}

int cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return allocate(memory, bytes, Kind::kHost);
}

int cudaHostRegister(void* memory, size_t bytes, unsigned) {
  if (in_host_function) return kNotPermitted;
  if (capturing > 0 && capture_mode != kModeRelaxed) return kUnsafeInCapture;
  if (failing_calls > 0) {
    --failing_calls;
    return kInvalidValue;
  }
  const std::lock_guard lock(memory_mutex);
  if (overlaps(static_cast<const uint8_t*>(memory), bytes)) return kAlreadyRegistered;
  blocks[static_cast<uint8_t*>(memory)] = {bytes, Kind::kHost};
  registered += bytes;
  return kSuccess;
}

int cudaHostUnregister(void* memory) {
  if (capturing > 0 && capture_mode != kModeRelaxed) return kUnsafeInCapture;
  const std::lock_guard lock(memory_mutex);
  const auto block = blocks.find(static_cast<uint8_t*>(memory));
  if (block == blocks.end()) return kNotRegistered;
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
    ++host_functions;
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
         : error == kAlreadyRegistered
             ? "part or all of the requested memory range is already mapped"
         : error == kNotRegistered ? "pointer does not correspond to a registered memory region"
                                   : "invalid argument";
}

// What tests call.

size_t fake_registered() { return registered; }

void* fake_malloc(size_t bytes) {
  void* memory = nullptr;
  return allocate(&memory, bytes, Kind::kDevice) == kSuccess ? memory : nullptr;
}

void* fake_stream() { return create_stream(); }

void fake_synchronize(void* handle) {
  auto& stream = *static_cast<Stream*>(handle);
  std::unique_lock lock(stream.mutex);
  stream.changed.wait(lock, [&] { return stream.steps.empty() && !stream.busy; });
}

void fake_destroy(void* stream) { destroy_stream(static_cast<Stream*>(stream)); }

// Copies between device memory and any other, and fills, in the stream's order.
void fake_copy(void* stream, void* to, const void* from, size_t bytes) {
  add(stream, [=] { std::memcpy(to, from, bytes); });
}
void fake_fill(void* stream, void* to, int byte, size_t bytes) {
  add(stream, [=] { std::memset(to, byte, bytes); });
}

void fake_begin_capture(void* stream) { begin_capture(*static_cast<Stream*>(stream)); }
void* fake_end_capture(void* stream) { return end_capture(*static_cast<Stream*>(stream)); }
void fake_launch(void* stream, void* graph) {
  launch(*static_cast<Stream*>(stream), *static_cast<Graph*>(graph));
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
int fake_host_functions() { return host_functions; }
void fake_break_memory_ops(int how) { broken = how; }
void fake_fail_next(int calls) { failing_calls = calls; }
int fake_pinned_blocks() {
  const std::lock_guard lock(memory_mutex);
  return static_cast<int>(std::count_if(blocks.begin(), blocks.end(), [](const auto& block) {
    return block.second.second == Kind::kHost;
  }));
}

}  // extern "C"
