#include "stream/flags.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace kt {
namespace {

// The thread polls for this long after the last call, which is longer than what lies between two
// layers or two steps of decoding, and sleeps then. A graph's first call wakes it; should a call
// come that does not (the graph's layers lie further apart), it looks by itself after a nap.
constexpr std::chrono::milliseconds kAwake{20};

// Rounds between two looks at the time, and two offers of the CPU to others, which it makes only
// where all CPUs have workers: microseconds. Beside one that is busy the offer costs this thread
// milliseconds until it runs again (4.5 on Linux 6.18, which leaves it a thousandth of the CPU,
// where without offers it has 40%).
constexpr unsigned kRoundsPerYield = 16;

inline void pause() { __builtin_ia32_pause(); }

// The CPUs that a thread may use, of any number that Linux knows.
class CpuSet {
 public:
  explicit CpuSet(pthread_t thread) {
    while (true) {
      set_ = CPU_ALLOC(capacity_);
      if (set_ == nullptr) return;
      const int error = pthread_getaffinity_np(thread, bytes(), set_);
      if (error == 0) return;
      CPU_FREE(set_);
      set_ = nullptr;
      if (error != EINVAL || capacity_ > (1 << 20)) return;
      capacity_ *= 2;  // too small for this machine
    }
  }
  ~CpuSet() {
    if (set_ != nullptr) CPU_FREE(set_);
  }
  CpuSet(const CpuSet&) = delete;
  CpuSet& operator=(const CpuSet&) = delete;

  void remove(int cpu) {
    if (set_ != nullptr && cpu < capacity_) CPU_CLR_S(static_cast<size_t>(cpu), bytes(), set_);
  }
  bool any() const { return set_ != nullptr && CPU_COUNT_S(bytes(), set_) > 0; }
  // Where there are any. A refusal costs placement, not results.
  void give_to(pthread_t thread) const { pthread_setaffinity_np(thread, bytes(), set_); }

 private:
  size_t bytes() const { return CPU_ALLOC_SIZE(capacity_); }
  int capacity_ = 1024;
  cpu_set_t* set_ = nullptr;
};

}  // namespace

// Ends when it may. Starting it does not change that: the graph of a proof that was given up may
// come to it late, and must end then.
class Flags::Probe final : public Flags::Call {
 public:
  void start() noexcept override { starts.fetch_add(1); }
  bool ended() const noexcept override { return may_end; }
  void finish() noexcept override {}

  std::atomic<int> starts{0};
  std::atomic<bool> may_end{false};
};

std::unique_ptr<Flags::Words, Flags::Unmap> Flags::map_words() {
  void* const pages =
      mmap(nullptr, sizeof(Words), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  madvise(pages, sizeof(Words), MADV_DONTFORK);  // a refusal leaves what was before
  return std::unique_ptr<Words, Unmap>(new (pages) Words);
}

void Flags::Unmap::operator()(Words* words) const { munmap(words, sizeof(Words)); }

Flags::Flags(const CudaRuntime& runtime, const MemoryOps& ops, std::chrono::milliseconds nap)
    : runtime_(runtime), ops_(ops), process_(getpid()), nap_(nap) {
  void* device = nullptr;
  {
    const RelaxedCapture relaxed(runtime_);
    runtime_.register_memory(words_.get(), sizeof(Words));
    const CudaError error = ops_.device_pointer(&device, words_.get(), 0);
    if (error != 0) runtime_.forget_memory(words_.get());
    runtime_.check(error, "cudaHostGetDevicePointer");
  }
  words_on_device_ = reinterpret_cast<uint64_t>(device);
  try {
    thread_ = std::thread([this] { poll(); });
  } catch (const std::system_error& error) {
    runtime_.forget_memory(words_.get());
    fail_runtime("cannot start the thread that watches CUDA graphs: ", error.what());
  }
  pthread_setname_np(thread_.native_handle(), "kt-flags");
}

void Flags::EndInOwnProcess::operator()(Flags* flags) const {
  if (getpid() == flags->process_) delete flags;
}

Flags::~Flags() {
  const bool idle = end_replayed();
  stopping_ = true;
  wake();
  thread_.join();
  if (!idle) {  // the device may yet write there
    static_cast<void>(words_.release());
    return;
  }
  runtime_.forget_memory(words_.get());
}

void Flags::keep_off(const std::vector<std::vector<int>>& cpus) {
  CpuSet allowed(thread_.native_handle());
  for (const std::vector<int>& group : cpus)
    for (const int cpu : group) allowed.remove(cpu);
  if (allowed.any())
    allowed.give_to(thread_.native_handle());
  else
    yields_ = true;
}

// ---- on the stream ------------------------------------------------------------------------------

uint64_t Flags::on_device(const Word& word) const {
  const auto offset =
      reinterpret_cast<const char*>(&word.value) - reinterpret_cast<const char*>(words_.get());
  return words_on_device_ + static_cast<uint64_t>(offset);
}

void Flags::put(CudaStream stream, MemoryOp* ops, unsigned count) const {
  ops_.check(ops_.batch(stream, count, ops, 0), "cuStreamBatchMemOp");
}

void Flags::begin(CudaStream stream) {
  int status = 0;
  uint64_t capture = 0;
  ops_.check(ops_.capture_info(stream, &status, &capture, nullptr, nullptr, nullptr),
             "cuStreamGetCaptureInfo");
  {
    const std::lock_guard lock(calls_mutex_);
    if (std::exchange(last_capture_, capture) == capture) return;
  }
  const auto wake_up = [](void* flags) { static_cast<Flags*>(flags)->wake(); };
  runtime_.check(runtime_.launch_host_func(stream, wake_up, this), "cudaLaunchHostFunc");
}

uint32_t Flags::ring(CudaStream stream, size_t set, Call& call) {
  uint32_t number = 0;
  {
    const std::lock_guard lock(calls_mutex_);
    calls_.push_back(&call);
    number = static_cast<uint32_t>(calls_.size());
  }
  // `done` may have this number from the replay before, so the stream takes it off first. It is a
  // number and no bit, since a call that no graph waits for may end when the next one has begun.
  std::array<MemoryOp, 2> ops{
      MemoryOp{MemoryOp::kWrite, on_device(words_->done[set]), 0, 0, {}},
      MemoryOp{MemoryOp::kWrite, on_device(words_->doorbells[set]), number, 0, {}}};
  try {
    put(stream, ops.data(), ops.size());
  } catch (...) {
    const std::lock_guard lock(calls_mutex_);
    calls_[number - 1] = nullptr;
    throw;
  }
  return number;
}

void Flags::wait(CudaStream stream, size_t set, uint32_t number) const {
  MemoryOp op{MemoryOp::kWait, on_device(words_->done[set]), number, kWaitUntilEqual, {}};
  put(stream, &op, 1);
}

// ---- the thread ---------------------------------------------------------------------------------

void Flags::poll() {
  Clock::time_point last = Clock::now();
  for (unsigned round = 1; !stopping_.load(std::memory_order_relaxed); ++round) {
    const bool started = start_rung(), finished = finish_ended();
    if (started || finished) last = Clock::now();
    pause();
    if (round % kRoundsPerYield != 0) continue;
    if (yields_.load(std::memory_order_relaxed)) std::this_thread::yield();
    if (any_running() || (Clock::now() - last > kAwake && nap())) last = Clock::now();
  }
}

bool Flags::start_rung() {
  bool any = false;
  for (size_t set = 0; set < kSets; ++set) {
    std::atomic<uint32_t>& doorbell = words_->doorbells[set].value;
    if (doorbell.load(std::memory_order_acquire) == 0) continue;
    // In one step with the device, which may ring again where nobody waited for the call.
    const uint32_t number = doorbell.exchange(0, std::memory_order_acq_rel);
    Running& running = running_[set];
    if (running.call != nullptr) running.call->finish();  // its graph did not wait for it
    running = {nullptr, number};
    {
      const std::lock_guard lock(calls_mutex_);
      running.call = calls_[number - 1];
    }
    if (running.call != nullptr) running.call->start();
    any = true;
  }
  return any;
}

bool Flags::finish_ended() {
  bool any = false;
  for (size_t set = 0; set < kSets; ++set) {
    Running& running = running_[set];
    if (running.call == nullptr || !running.call->ended()) continue;
    running.call->finish();
    running.call = nullptr;
    words_->done[set].value.store(running.number, std::memory_order_release);
    any = true;
  }
  return any;
}

bool Flags::any_running() const {
  for (const Running& running : running_)
    if (running.call != nullptr) return true;
  return false;
}

// Whether it was woken.
bool Flags::nap() {
  std::unique_lock lock(nap_mutex_);
  const bool woken = woken_.wait_for(lock, nap_, [&] { return wake_; });
  wake_ = false;
  return woken;
}

void Flags::wake() {
  {
    const std::lock_guard lock(nap_mutex_);
    wake_ = true;
  }
  woken_.notify_one();
}

// ---- whether it works here ----------------------------------------------------------------------

namespace {

template <class F>
bool comes_true(std::chrono::milliseconds limit, F condition) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

}  // namespace

void Flags::prove(std::chrono::milliseconds limit) {
  const RelaxedCapture relaxed(runtime_);
  constexpr unsigned kNonBlocking = 1;
  if (getpid() != process_) fail_runtime("another process has started the thread");
  end_replayed();
  Probe& probe = *probes_.emplace_back(std::make_unique<Probe>());
  CudaStream stream = nullptr;
  void *graph = nullptr, *executable = nullptr;
  runtime_.check(ops_.create_stream(&stream, kNonBlocking), "cudaStreamCreateWithFlags");
  std::string failure;
  uint32_t number = 0;
  try {
    runtime_.check(ops_.begin_capture(stream, kCaptureModeRelaxed), "cudaStreamBeginCapture");
    try {
      begin(stream);
      number = ring(stream, 0, probe);
      wait(stream, 0, number);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    const CudaError ended = ops_.end_capture(stream, &graph);
    if (!failure.empty()) fail_runtime(failure);  // what comes after is its consequence
    runtime_.check(ended, "cudaStreamEndCapture");
    runtime_.check(ops_.instantiate(&executable, graph, 0), "cudaGraphInstantiate");
    prove_replays(probe, stream, executable, limit);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  if (!failure.empty() && number != 0) {
    // Nothing must be left waiting on the device, nor come to wait: a graph that has not rung yet
    // takes the number off again, and the thread puts it there when it rings.
    probe.may_end = true;
    words_->done[0].value.store(number, std::memory_order_release);
  }
  replayed_.push_back({stream, graph, executable});
  comes_true(limit, [&] { return end_replayed(); });
  if (!failure.empty()) fail_runtime(failure);
}

// Whether all of it has ended. A stream that stands still must stay: its end would be waited for.
bool Flags::end_replayed() {
  if (replayed_.empty()) return true;
  std::erase_if(replayed_, [&](const Replayed& it) {
    if (ops_.query_stream(it.stream) == kNotReady) return false;
    if (it.executable != nullptr) ops_.destroy_executable(it.executable);
    if (it.graph != nullptr) ops_.destroy_graph(it.graph);
    ops_.destroy_stream(it.stream);
    return true;
  });
  runtime_.last_error();  // a stream that is not ready counts as one
  return replayed_.empty();
}

// Twice: the second time the words are not new.
void Flags::prove_replays(Probe& probe, CudaStream stream, void* executable,
                          std::chrono::milliseconds limit) {
  for (int replay = 1; replay <= 2; ++replay) {
    probe.may_end = false;
    runtime_.check(ops_.launch(executable, stream), "cudaGraphLaunch");
    if (!comes_true(limit, [&] { return probe.starts == replay; }))
      fail_runtime("what a graph writes to pinned memory does not arrive");
    const auto ended = [&] { return ops_.query_stream(stream) != kNotReady; };
    if (ended()) fail_runtime("a graph does not wait for a word of pinned memory");
    probe.may_end = true;
    if (!comes_true(limit, ended)) fail_runtime("a graph does not see a word of pinned memory");
    runtime_.check(ops_.query_stream(stream), "a graph of memory operations");
  }
}

}  // namespace kt
