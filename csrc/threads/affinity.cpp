#include "threads/affinity.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

#include "base/error.h"

namespace kt {

void check_cpu(int cpu) {
  if (cpu < 0 || cpu > kLargestCpu) fail_argument("CPU ", cpu, ": expected 0 to ", kLargestCpu);
}

void pin(std::thread& thread, const std::vector<int>& cpus) {
  const int capacity = std::max(*std::max_element(cpus.begin(), cpus.end()) + 1, 1024);
  cpu_set_t* set = CPU_ALLOC(capacity);
  if (!set) return;
  const size_t bytes = CPU_ALLOC_SIZE(capacity);
  CPU_ZERO_S(bytes, set);
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set);
  pthread_setaffinity_np(thread.native_handle(), bytes, set);
  CPU_FREE(set);
}

}  // namespace kt
