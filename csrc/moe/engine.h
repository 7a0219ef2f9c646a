// What all layers of a process share: the workers, the target they run and the memory of calls.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/buffer.h"
#include "base/buffer_store.h"
#include "moe/routing.h"
#include "targets/kernels.h"
#include "threads/guided_counter.h"
#include "threads/pool.h"

namespace kt {

// Memory that calls of all layers use in turn, one set for each slice; jobs run one after the
// other. The workers of a slice are the first to write to it, which places it on their node.
struct Scratch {
  Buffer x_q, x_scales;     // quantised inputs
  Buffer h, h_q, h_scales;  // the slice's part of the intermediate rows, float and quantised
  Buffer out;               // fp32 sums over the slice's part
  Buffer workspace;         // of each worker in turn
};

// What one call needs from its submission to its end, reused by later calls.
struct CallMemory {
  struct alignas(64) SliceProgress {
    GuidedCounter gate_up, down;
  };

  Routing routing;
  Buffer x, x_scales;  // the inputs, quantised or as they came
  std::vector<SliceProgress> progress;
  std::vector<std::atomic<int32_t>> panels_left;  // [slice, expert] gate and up panels to compute
  std::vector<std::atomic<int32_t>> slices_left;  // [group of hidden columns] slices to sum
};

// Sums over the calls that have ended. What they leave of a server's time was spent elsewhere.
struct CallTotals {
  int64_t calls = 0;
  int64_t tokens = 0;
  int64_t experts = 0;     // of each call, those that at least one token uses: what it reads
  int64_t prepare_ns = 0;  // from a call's start to its submission: routing, few inputs to int8
  // From there, or from the end of the call before it, to the end of its last worker.
  int64_t workers_ns = 0;
};

class Engine {
 public:
  // Workers on `cpus`, group after group; layers are cut into `slices`. Slice s belongs to the
  // workers of group s % groups.
  Engine(std::vector<std::vector<int>> cpus, int slices, const Kernels& chosen);

  std::unique_ptr<CallMemory> take_memory();
  void give_memory(std::unique_ptr<CallMemory> memory) noexcept;

  CallTotals totals() const;
  // A call of the workers from its submission until now, but for `workers_ns` and `calls`, which
  // this counts.
  void add_to_totals(CallTotals call, std::chrono::steady_clock::time_point submitted) noexcept;

  int slices() const { return static_cast<int>(scratch.size()); }

  static constexpr int kMaxSlices = 1024;  // NUMA nodes that Linux knows

  const Kernels& kernels;
  std::mutex submission;         // one call at a time, which may grow the scratch
  std::vector<Scratch> scratch;  // of each slice
  const std::shared_ptr<BufferStore> outputs = std::make_shared<BufferStore>();
  // Sums of deferred experts, which no device reads.
  const std::shared_ptr<BufferStore> deferred_sums = std::make_shared<BufferStore>();

 private:
  std::mutex memory_mutex_;  // never held while waiting for a job: jobs give memory back
  std::vector<std::unique_ptr<CallMemory>> free_memory_;
  size_t memories_ = 0;  // made so far
  mutable std::mutex totals_mutex_;
  CallTotals totals_;
  std::chrono::steady_clock::time_point last_end_;  // of a call

 public:
  WorkerPool pool;  // last: its workers end before the memory goes
};

}  // namespace kt
