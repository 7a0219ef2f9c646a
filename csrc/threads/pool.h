// Pinned worker threads in groups, one group for each NUMA node, that run jobs one after the other.
// A job is a sequence of phases; every worker runs every phase, and no worker starts a phase before
// all of its group have ended the one before. A job ends when all groups have.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace kt {

// A worker's place among the workers of its pool.
struct Worker {
  int index;  // among all
  int group;  // of `groups`
  int rank;   // among the `group_size` workers of its group
  int group_size;
  int groups;
};

class Job {
 public:
  virtual ~Job() = default;
  virtual int phases() const = 0;
  // An exception ends the job: phases that have not begun are skipped and wait() throws it.
  virtual void run(int phase, const Worker& worker) = 0;
  // Called by one worker after all phases, well or not, before wait() returns.
  virtual void finish() noexcept {}
  // Well or not, or abandoned.
  bool ended() const { return done_.load(std::memory_order_acquire) != 0; }

 private:
  friend class WorkerPool;
  std::mutex mutex_;  // of error_
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::atomic<uint32_t> done_{0};
};

// Spins briefly, then sleeps on a futex: a phase's end is usually microseconds away, but on a busy
// machine a worker may be descheduled for milliseconds.
void wait_changed(const std::atomic<uint32_t>& word, uint32_t old);

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}

  // The last to arrive calls `last` before any of them returns.
  template <class F>
  void wait(F last) {
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      last();
      generation_.fetch_add(1, std::memory_order_release);
      generation_.notify_all();
    } else {
      wait_changed(generation_, generation);
    }
  }
  void wait() {
    wait([] {});
  }

 private:
  const int count_;
  // Apart, so that arrivals do not disturb those who spin.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

class WorkerPool {
 public:
  // One worker for each CPU, pinned to it, in groups as given.
  explicit WorkerPool(std::vector<std::vector<int>> cpus);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()); }
  int groups() const { return static_cast<int>(cpus_.size()); }
  const std::vector<std::vector<int>>& cpus() const { return cpus_; }

  // Queues a job and returns; jobs run in the order of submission. Waits while kMaxJobs are queued.
  // A job that was abandoned is not queued.
  void submit(std::shared_ptr<Job> job);
  // Waits until the job has ended and rethrows what a worker threw.
  static void wait(Job& job);
  // Ends the wait for a job that may never end, be it for its turn: wait() throws
  // std::runtime_error with the reason. False if the job has ended.
  bool abandon(Job& job, const std::string& reason);
  // For a worker's job: calls f(), which reads or writes a little of the memory of those who wait,
  // unless the job has failed. abandon() returns when no such call is left: then it is theirs.
  template <class F>
  void in_memory_of_waiters(const Job& job, const Worker& worker, const F& f) {
    std::atomic<bool>& busy = busy_[static_cast<size_t>(worker.index)].flag;
    busy.store(true);  // in one order with failed_ for all: either this or abandon sees the other
    if (!job.failed_.load()) f();
    busy.store(false, std::memory_order_release);
  }
  // Whether every job submitted so far has ended, well or not; and waiting until that is so, or
  // until the job that has to wait for it is abandoned: then false.
  bool idle() const;
  bool drain(const Job* waiting = nullptr);

 private:
  static constexpr uint64_t kMaxJobs = 64;

  void work(Worker worker);
  Job* next_job(uint64_t sequence);
  void run_job(Job& job, const Worker& worker);
  void complete(uint64_t sequence);
  void stop();

  struct alignas(64) Busy {
    std::atomic<bool> flag{false};
  };

  const std::vector<std::vector<int>> cpus_;
  std::vector<Busy> busy_;  // of each worker
  std::deque<Barrier> group_barriers_;
  Barrier end_barrier_;

  std::mutex mutex_;  // of submissions and completions; workers take jobs without it
  std::condition_variable completion_;
  std::array<std::shared_ptr<Job>, kMaxJobs> ring_;  // job i is at i % kMaxJobs until it has ended
  alignas(64) std::atomic<uint64_t> submitted_{0};
  std::atomic<uint32_t> wakeups_{0};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint64_t> completed_{0};
  std::vector<std::thread> threads_;
};

// Calls f(list, item) for all items [0, items) of every list; list l is worked off by the workers
// of group l % groups, one item at a time. Waits for the end; throws what f threw.
template <class F>
void parallel_for(WorkerPool& pool, int lists, int64_t items, F f) {
  class Each : public Job {
   public:
    Each(int lists, int64_t items, F f)
        : items_(items), f_(std::move(f)), next_(static_cast<size_t>(lists)) {}
    int phases() const override { return 1; }
    void run(int, const Worker& worker) override {
      for (auto list = static_cast<size_t>(worker.group); list < next_.size();
           list += static_cast<size_t>(worker.groups))
        for (int64_t i = next_[list]++; i < items_; i = next_[list]++)
          f_(static_cast<int>(list), i);
    }

   private:
    const int64_t items_;
    const F f_;
    std::vector<std::atomic<int64_t>> next_;
  };
  const auto job = std::make_shared<Each>(lists, items, std::move(f));
  pool.submit(job);
  WorkerPool::wait(*job);
}

}  // namespace kt
