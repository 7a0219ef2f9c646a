#include "numa/pool.h"

#include <pthread.h>
#include <sched.h>

#include "base/error.h"

namespace kt {
namespace {

// About 20 microseconds: longer than the gap between phases, shorter than anyone notices on an
// idle server.
constexpr int kSpins = 1000;

inline void pause() { __builtin_ia32_pause(); }

void pin(std::thread& thread, int cpu) {
  const int capacity = cpu + 1 > 1024 ? cpu + 1 : 1024;
  cpu_set_t* set = CPU_ALLOC(capacity);
  const size_t bytes = CPU_ALLOC_SIZE(capacity);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cpu, bytes, set);
  // A refusal (a cpuset that changed meanwhile) costs placement, not results.
  pthread_setaffinity_np(thread.native_handle(), bytes, set);
  CPU_FREE(set);
}

// Waits until `word` is no longer `old`.
void wait_changed(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

void Barrier::wait() {
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_changed(generation_, generation);
  }
}

WorkerPool::WorkerPool(std::vector<int> cpus)
    : cpus_(std::move(cpus)), barrier_(static_cast<int>(cpus_.size())) {
  if (cpus_.empty()) fail_argument("a worker pool needs at least one CPU");
  threads_.reserve(cpus_.size());
  for (int i = 0; i < size(); ++i) {
    threads_.emplace_back([this, i] { work(i); });
    pthread_setname_np(threads_.back().native_handle(), ("kt-worker-" + std::to_string(i)).c_str());
    pin(threads_.back(), cpus_[static_cast<size_t>(i)]);
  }
}

WorkerPool::~WorkerPool() {
  stopping_.store(true, std::memory_order_release);
  wakeups_.fetch_add(1, std::memory_order_release);
  wakeups_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::submit(std::shared_ptr<Job> job) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
    submitted_.fetch_add(1, std::memory_order_release);
  }
  wakeups_.fetch_add(1, std::memory_order_release);
  wakeups_.notify_all();
}

void WorkerPool::wait(Job& job) {
  std::unique_lock lock(job.mutex_);
  job.ended_.wait(lock, [&] { return job.done_; });
  if (job.error_) std::rethrow_exception(job.error_);
}

void WorkerPool::drain() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return queue_.empty(); });
}

// The job of that number, or null once the pool stops and all submitted jobs are done.
std::shared_ptr<Job> WorkerPool::next_job(uint64_t sequence) {
  while (true) {
    const uint32_t seen = wakeups_.load(std::memory_order_acquire);
    if (sequence < submitted_.load(std::memory_order_acquire)) {
      const std::lock_guard lock(mutex_);
      return queue_[sequence - first_];
    }
    if (stopping_.load(std::memory_order_acquire)) return nullptr;
    wait_changed(wakeups_, seen);
  }
}

void WorkerPool::run_job(Job& job, int worker) {
  for (int phase = 0; phase < job.phases(); ++phase) {
    if (!job.failed_.load(std::memory_order_acquire)) {
      try {
        job.run(phase, worker, size());
      } catch (...) {
        const std::lock_guard lock(job.mutex_);
        if (!job.error_) job.error_ = std::current_exception();
        job.failed_.store(true, std::memory_order_release);
      }
    }
    barrier_.wait();
  }
}

void WorkerPool::work(int worker) {
  for (uint64_t sequence = 0;; ++sequence) {
    const std::shared_ptr<Job> job = next_job(sequence);
    if (!job) return;
    run_job(*job, worker);
    if (worker != 0) continue;
    // The last barrier of run_job means that all workers are through; none will ask for it again.
    {
      const std::lock_guard lock(mutex_);
      queue_.pop_front();
      ++first_;
      if (queue_.empty()) idle_.notify_all();
    }
    {
      const std::lock_guard lock(job->mutex_);
      job->done_ = true;
    }
    job->ended_.notify_all();
  }
}

}  // namespace kt
