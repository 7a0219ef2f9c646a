#include "numa/topology.h"

#include <sched.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>

#include "base/error.h"

namespace kt {
namespace {

namespace fs = std::filesystem;

// First line of a small file, "" when it cannot be read. No iostreams: see base/error.h.
std::string read_line(const fs::path& path) {
  std::string line;
  if (std::FILE* file = std::fopen(path.c_str(), "re")) {
    for (int c = std::fgetc(file); c != EOF && c != '\n'; c = std::fgetc(file)) {
      line += static_cast<char>(c);
    }
    std::fclose(file);
  }
  return line;
}

// The node is the nodeN link in the CPU's own directory; without NUMA support there is none.
int node_of(int cpu) {
  std::error_code ignored;
  const fs::path base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
  for (const auto& entry : fs::directory_iterator(base, ignored)) {
    const std::string name = entry.path().filename();
    if (name.rfind("node", 0) == 0 && name.size() > 4 && std::isdigit(name[4]))
      return std::stoi(name.substr(4));
  }
  return 0;
}

std::string core_of(int cpu) {
  const fs::path base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
  const std::string siblings = read_line(base / "thread_siblings_list");
  return siblings.empty() ? "cpu" + std::to_string(cpu) : siblings;
}

}  // namespace

std::vector<Cpu> allowed_cpus() {
  // A fixed cpu_set_t ends at 1024 CPUs; larger hosts exist.
  for (int capacity = 1024;; capacity *= 4) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    const size_t bytes = CPU_ALLOC_SIZE(capacity);
    const bool read = sched_getaffinity(0, bytes, set) == 0;
    std::vector<Cpu> cpus;
    std::map<std::string, int> threads_of_core;
    for (int id = 0; read && id < capacity; ++id) {
      if (CPU_ISSET_S(id, bytes, set))
        cpus.push_back({id, node_of(id), threads_of_core[core_of(id)]++});
    }
    CPU_FREE(set);
    if (read) return cpus;
    if (capacity > 1 << 20)
      fail_runtime("sched_getaffinity failed: cannot tell which CPUs may be used");
  }
}

std::vector<std::vector<int>> choose_cpus(const std::vector<Cpu>& cpus, int threads, int pools) {
  if (threads < 1) fail_argument("thread count is ", threads, ": expected at least 1");
  if (pools < 1) fail_argument("threadpool count is ", pools, ": expected at least 1");
  std::vector<Cpu> free = cpus;
  std::stable_sort(free.begin(), free.end(),
                   [](const Cpu& a, const Cpu& b) { return a.core_rank < b.core_rank; });
  threads = std::min(threads, static_cast<int>(free.size()));
  pools = std::min(pools, threads);
  std::vector<int> nodes;
  for (const Cpu& cpu : free) nodes.push_back(cpu.node);
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());

  std::vector<std::vector<int>> chosen(static_cast<size_t>(pools));
  const auto take = [&](std::vector<int>& group, std::vector<Cpu>::iterator cpu) {
    group.push_back(cpu->id);
    free.erase(cpu);
  };
  int missing = threads;
  for (int pool = 0; pool < pools; ++pool) {
    const int node = nodes[static_cast<size_t>(pool) % nodes.size()];
    for (int i = threads / pools + (pool < threads % pools); i > 0; --i) {
      const auto cpu = std::find_if(free.begin(), free.end(),
                                    [&](const Cpu& candidate) { return candidate.node == node; });
      if (cpu == free.end()) break;
      take(chosen[static_cast<size_t>(pool)], cpu);
      --missing;
    }
  }
  // Where a node has too few, CPUs of others help the smallest group: all have the same work.
  for (; missing > 0; --missing)
    take(*std::min_element(chosen.begin(), chosen.end(),
                           [](const auto& a, const auto& b) { return a.size() < b.size(); }),
         free.begin());
  return chosen;
}

}  // namespace kt
