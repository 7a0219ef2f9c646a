#include "threads/pool.h"

#include <pthread.h>

#include <numeric>
#include <string>
#include <system_error>

#include "base/error.h"
#include "threads/affinity.h"

namespace kt {
namespace {

// About 20 microseconds: longer than the gap between phases, shorter than anyone notices on an
// idle server.
constexpr int kSpins = 1000;

inline void pause() { __builtin_ia32_pause(); }

int count(const std::vector<std::vector<int>>& cpus) {
  return std::accumulate(cpus.begin(), cpus.end(), 0, [](int sum, const std::vector<int>& group) {
    return sum + static_cast<int>(group.size());
  });
}

}  // namespace

void wait_changed(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

WorkerPool::WorkerPool(std::vector<std::vector<int>> cpus)
    : cpus_(std::move(cpus)), busy_(static_cast<size_t>(count(cpus_))), end_barrier_(count(cpus_)) {
  if (cpus_.empty()) fail_argument("a worker pool needs at least one CPU");
  for (const std::vector<int>& group : cpus_) {
    if (group.empty()) fail_argument("a group of workers needs at least one CPU");
    for (int cpu : group) check_cpu(cpu);
    group_barriers_.emplace_back(static_cast<int>(group.size()));
  }
  threads_.reserve(static_cast<size_t>(count(cpus_)));
  Worker worker{0, 0, 0, 0, static_cast<int>(cpus_.size())};
  for (const std::vector<int>& group : cpus_) {
    worker.group_size = static_cast<int>(group.size());
    for (worker.rank = 0; worker.rank < worker.group_size; ++worker.rank, ++worker.index) {
      try {
        threads_.emplace_back([this, worker] { work(worker); });
      } catch (const std::system_error& error) {
        stop();
        fail_runtime("cannot start worker thread ", worker.index + 1, " of ", count(cpus_), ": ",
                     error.what(), "; raise the limit on processes or use fewer threads");
      }
      const std::string name = concat("kt-worker-", worker.index);
      pthread_setname_np(threads_.back().native_handle(), name.c_str());
      pin(threads_.back(), {group[static_cast<size_t>(worker.rank)]});
    }
    ++worker.group;
  }
}

WorkerPool::~WorkerPool() { stop(); }

void WorkerPool::stop() {
  stopping_.store(true, std::memory_order_release);
  wakeups_.fetch_add(1, std::memory_order_release);
  wakeups_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::submit(std::shared_ptr<Job> job) {
  {
    std::unique_lock lock(mutex_);
    completion_.wait(
        lock, [&] { return submitted_.load() - completed_.load() < kMaxJobs || job->ended(); });
    if (job->ended()) return;
    const uint64_t sequence = submitted_.load();
    ring_[sequence % kMaxJobs] = std::move(job);
    submitted_.store(sequence + 1, std::memory_order_release);
  }
  wakeups_.fetch_add(1, std::memory_order_release);
  wakeups_.notify_all();
}

void WorkerPool::wait(Job& job) {
  wait_changed(job.done_, 0);
  const std::lock_guard lock(job.mutex_);
  if (job.error_) std::rethrow_exception(job.error_);
}

bool WorkerPool::abandon(Job& job, const std::string& reason) {
  {
    const std::lock_guard lock(job.mutex_);
    if (job.ended()) return false;
    if (!job.error_) job.error_ = std::make_exception_ptr(std::runtime_error(reason));
  }
  job.failed_.store(true);  // what has not begun is left out
  for (const Busy& busy : busy_)
    while (busy.flag.load(std::memory_order_acquire)) std::this_thread::yield();
  {
    const std::lock_guard lock(mutex_);  // of those who wait for their turn
    job.done_.store(1, std::memory_order_release);
  }
  job.done_.notify_all();
  completion_.notify_all();
  return true;
}

bool WorkerPool::idle() const { return completed_.load() == submitted_.load(); }

bool WorkerPool::drain(const Job* waiting) {
  std::unique_lock lock(mutex_);
  completion_.wait(lock, [&] { return idle() || (waiting != nullptr && waiting->ended()); });
  return idle();
}

// The job of that number, or null once the pool stops and all submitted jobs are done.
Job* WorkerPool::next_job(uint64_t sequence) {
  while (true) {
    const uint32_t seen = wakeups_.load(std::memory_order_acquire);
    if (sequence < submitted_.load(std::memory_order_acquire))
      return ring_[sequence % kMaxJobs].get();
    if (stopping_.load(std::memory_order_acquire)) return nullptr;
    wait_changed(wakeups_, seen);
  }
}

void WorkerPool::run_job(Job& job, const Worker& worker) {
  for (int phase = 0; phase < job.phases(); ++phase) {
    if (phase > 0) group_barriers_[static_cast<size_t>(worker.group)].wait();
    if (phase > 0 && job.failed_.load(std::memory_order_acquire)) continue;
    try {
      job.run(phase, worker);
    } catch (...) {
      const std::lock_guard lock(job.mutex_);
      if (!job.error_) job.error_ = std::current_exception();
      job.failed_.store(true, std::memory_order_release);
    }
  }
}

void WorkerPool::work(Worker worker) {
  for (uint64_t sequence = 0;; ++sequence) {
    Job* job = next_job(sequence);
    if (job == nullptr) return;
    run_job(*job, worker);
    end_barrier_.wait([&] { complete(sequence); });
  }
}

// By the last worker of a job; the others are through with it.
void WorkerPool::complete(uint64_t sequence) {
  const std::shared_ptr<Job> job = std::move(ring_[sequence % kMaxJobs]);
  job->finish();
  {
    const std::lock_guard lock(mutex_);
    completed_.store(sequence + 1);
  }
  completion_.notify_all();
  job->done_.store(1, std::memory_order_release);
  job->done_.notify_all();
}

}  // namespace kt
