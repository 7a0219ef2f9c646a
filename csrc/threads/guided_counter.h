// How workers share a range without waiting for each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

namespace kt {

// Hands out [0, total) in runs of half of each worker's share of what is left, at least one.
class GuidedCounter {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }
  // The next run [begin, end); empty when all is taken.
  std::pair<int64_t, int64_t> take(int64_t total, int workers) {
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (true) {
      if (begin >= total) return {total, total};
      const int64_t run = std::max<int64_t>(1, (total - begin) / (2 * workers));
      const int64_t end = std::min(total, begin + run);
      if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
    }
  }

 private:
  std::atomic<int64_t> next_{0};
};

}  // namespace kt
