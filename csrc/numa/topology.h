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

// `threads` of the CPUs in `pools` groups: group g takes the g-th NUMA node (modulo the nodes there
// are), physical cores before hyperthreads. Fewer CPUs where there are not as many, and fewer
// groups where there are fewer CPUs than groups: workers never share a CPU.
std::vector<std::vector<int>> choose_cpus(const std::vector<Cpu>& cpus, int threads, int pools);

}  // namespace kt
