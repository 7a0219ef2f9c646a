#include "moe/engine.h"

#include <algorithm>

#include "base/error.h"

namespace kt {

Engine::Engine(std::vector<std::vector<int>> cpus, int slices, const Kernels& chosen)
    : kernels(chosen),
      scratch(static_cast<size_t>(std::clamp(slices, 0, kMaxSlices))),
      pool(std::move(cpus)) {
  if (slices > kMaxSlices)
    fail_argument("an engine of ", slices, " slices: expected at most ", kMaxSlices);
  if (slices < pool.groups())
    fail_argument("an engine of ", pool.groups(), " groups of workers needs as many slices, not ",
                  slices);
}

CallTotals Engine::totals() const {
  const std::lock_guard lock(totals_mutex_);
  return totals_;
}

void Engine::add_to_totals(CallTotals call,
                           std::chrono::steady_clock::time_point submitted) noexcept {
  const std::lock_guard lock(totals_mutex_);
  const auto begin = std::max(submitted, last_end_);
  last_end_ = std::chrono::steady_clock::now();
  call.workers_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(last_end_ - begin).count();
  ++totals_.calls;
  totals_.tokens += call.tokens;
  totals_.experts += call.experts;
  totals_.prepare_ns += call.prepare_ns;
  totals_.workers_ns += call.workers_ns;
}

std::unique_ptr<CallMemory> Engine::take_memory() {
  {
    const std::lock_guard lock(memory_mutex_);
    if (!free_memory_.empty()) {
      std::unique_ptr<CallMemory> memory = std::move(free_memory_.back());
      free_memory_.pop_back();
      return memory;
    }
  }
  auto memory = std::make_unique<CallMemory>();
  memory->progress = std::vector<CallMemory::SliceProgress>(scratch.size());
  const std::lock_guard lock(memory_mutex_);
  free_memory_.reserve(++memories_);  // so that giving back cannot fail
  return memory;
}

void Engine::give_memory(std::unique_ptr<CallMemory> memory) noexcept {
  const std::lock_guard lock(memory_mutex_);
  free_memory_.push_back(std::move(memory));
}

}  // namespace kt
