// Which CPUs this process may use and how they lie on cores and NUMA nodes.
#pragma once

#include <vector>

namespace kt {

struct Cpu {
  int id;
  int node;
  int core_rank;  // 0 for the first hyperthread of its core, 1 for the second, ...
};

// The CPUs of this process's affinity mask (cpuset and taskset included), by id.
std::vector<Cpu> allowed_cpus();

// `threads` CPUs for `pools` worker groups, group after group: group g takes the g-th NUMA node
// (modulo the nodes there are), physical cores before hyperthreads. Fewer than `threads` when the
// process may not use that many: workers never share a CPU.
std::vector<int> choose_cpus(int threads, int pools);

}  // namespace kt
