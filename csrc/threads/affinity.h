// Which CPUs a thread may run on.
#pragma once

#include <thread>
#include <vector>

namespace kt {

constexpr int kLargestCpu = 1 << 20;  // far above what Linux numbers

// Throws std::invalid_argument unless the number could be that of a CPU.
void check_cpu(int cpu);

// Lets a thread run on these CPUs only, of which there is at least one. A refusal (a cpuset that
// changed meanwhile, no memory) costs placement, not results.
void pin(std::thread& thread, const std::vector<int>& cpus);

}  // namespace kt
