// Calls on a stream that are started and ended through words of pinned memory, for calls that a
// graph has captured. The stream writes a call's number to a doorbell; a thread that polls starts
// the call and, when it has ended, writes the number to a second word, for which the stream waits:
//
//   ring: done = 0 | doorbell = number
//   wait: until done == number
//
// Host functions do the same, but CUDA starts each on a thread of its own, and whoever waits for
// the workers there has to be woken: 0.13 ms of a layer's 1.7 in decode (docs/performance.md).
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stream/memory_ops.h"
#include "stream/runtime.h"

namespace kt {

class Flags {
 public:
  // Calls of a set follow each other; those of different sets may overlap.
  static constexpr size_t kSets = 2;

  class Call {
   public:
    Call() = default;
    virtual ~Call() = default;
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    // By the thread that polls. `ended` says whether `finish`, which leaves the output in memory,
    // would wait.
    virtual void start() noexcept = 0;
    virtual bool ended() const noexcept = 0;
    virtual void finish() noexcept = 0;
  };

  // Starts the thread, which looks by itself this often where nothing wakes it. Throws
  // std::runtime_error for what CUDA refuses.
  Flags(const CudaRuntime& runtime, const MemoryOps& ops, std::chrono::milliseconds nap);
  ~Flags();
  Flags(const Flags&) = delete;
  Flags& operator=(const Flags&) = delete;

  // In a forked process there is no thread to end, and what it waited with must not be destroyed:
  // a condition variable's end waits for whoever waits there, of whom the fork has a copy.
  struct EndInOwnProcess {
    void operator()(Flags* flags) const;
  };

  // Replays a graph of one call on a stream of its own; legal while others are being captured.
  // Throws std::runtime_error that says what did not happen within the limit.
  void prove(std::chrono::milliseconds limit);

  // Moves the thread away from the CPUs of workers, if there are others: they are pinned, and a
  // thread that polls beside one would take half of its time. Where there are none it offers its
  // CPU to them instead.
  void keep_off(const std::vector<std::vector<int>>& cpus);

  // Before what a graph's first call puts on the stream: a host function that wakes the thread.
  // Nothing for its later calls.
  void begin(CudaStream stream);
  // Puts a captured call's start on the stream, and later the wait for its end; returns its
  // number. The call must stay forever.
  uint32_t ring(CudaStream stream, size_t set, Call& call);
  void wait(CudaStream stream, size_t set, uint32_t number) const;

 private:
  using Clock = std::chrono::steady_clock;
  class Probe;
  // A proof's, which the device may still be busy with.
  struct Replayed {
    CudaStream stream = nullptr;
    void *graph = nullptr, *executable = nullptr;
  };

  // A cache line for each, so that a write of the device takes no other word from a CPU.
  struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
  };
  struct alignas(4096) Words {
    std::array<Word, kSets> doorbells, done;
  };
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  // Pages of their own, which no fork has: with a copy of a page that the device writes either
  // process could get the one that it does not.
  struct Unmap {
    void operator()(Words* words) const;
  };
  static std::unique_ptr<Words, Unmap> map_words();

  uint64_t on_device(const Word& word) const;
  void put(CudaStream stream, MemoryOp* ops, unsigned count) const;
  void prove_replays(Probe& probe, CudaStream stream, void* executable,
                     std::chrono::milliseconds limit);
  bool end_replayed();

  void poll();
  bool start_rung();
  bool finish_ended();
  bool any_running() const;
  bool nap();
  void wake();

  const CudaRuntime runtime_;
  const MemoryOps ops_;
  // Own memory that is registered with CUDA: what CUDA allocates goes at the process's end, while
  // the thread still polls.
  std::unique_ptr<Words, Unmap> words_ = map_words();
  uint64_t words_on_device_ = 0;
  const int process_;  // whose thread it is: a fork has none
  // By proof: what a graph of one refers to stays forever.
  std::vector<std::unique_ptr<Probe>> probes_;
  std::vector<Replayed> replayed_;

  std::mutex calls_mutex_;
  std::vector<Call*> calls_;  // by number - 1
  uint64_t last_capture_ = ~uint64_t{0};

  // The thread's.
  struct Running {
    Call* call = nullptr;
    uint32_t number = 0;
  };
  std::array<Running, kSets> running_;

  const std::chrono::milliseconds nap_;
  std::atomic<bool> yields_{false};  // no CPU is left besides the workers'
  std::mutex nap_mutex_;
  std::condition_variable woken_;
  bool wake_ = false;
  std::atomic<bool> stopping_{false};
  std::thread thread_;  // last: it uses all others
};

}  // namespace kt
