// Pinned worker threads that run jobs one after the other. A job is a sequence of phases; every
// worker runs every phase, and no worker starts a phase before all have ended the one before.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kt {

class Job {
 public:
  virtual ~Job() = default;
  virtual int phases() const = 0;
  // Called by every worker 0..workers-1. An exception ends the job: later phases are skipped and
  // wait() throws it.
  virtual void run(int phase, int worker, int workers) = 0;

 private:
  friend class WorkerPool;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  bool done_ = false;
};

// Spins briefly, then sleeps on a futex: a phase's end is usually microseconds away, but on a busy
// machine a worker may be descheduled for milliseconds.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> generation_{0};
};

class WorkerPool {
 public:
  // One worker for each CPU of `cpus`, pinned to it.
  explicit WorkerPool(std::vector<int> cpus);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int size() const { return static_cast<int>(cpus_.size()); }
  const std::vector<int>& cpus() const { return cpus_; }

  // Queues a job and returns at once; jobs run in the order of submission.
  void submit(std::shared_ptr<Job> job);
  // Waits until the job has ended and rethrows what a worker threw.
  static void wait(Job& job);
  // Waits until every job submitted so far has ended, well or not.
  void drain();

 private:
  void work(int worker);
  std::shared_ptr<Job> next_job(uint64_t sequence);
  void run_job(Job& job, int worker);

  const std::vector<int> cpus_;
  Barrier barrier_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<Job>> queue_;  // jobs [first_, first_ + size)
  uint64_t first_ = 0;
  std::condition_variable idle_;
  std::atomic<uint64_t> submitted_{0};
  std::atomic<uint32_t> wakeups_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

}  // namespace kt
