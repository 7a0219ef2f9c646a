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

std::vector<int> choose_cpus(int threads, int pools) {
  if (threads < 1) fail_argument("thread count is ", threads, ": expected at least 1");
  if (pools < 1) fail_argument("threadpool count is ", pools, ": expected at least 1");
  std::vector<Cpu> free = allowed_cpus();
  std::stable_sort(free.begin(), free.end(),
                   [](const Cpu& a, const Cpu& b) { return a.core_rank < b.core_rank; });
  std::vector<int> nodes;
  for (const Cpu& cpu : free) nodes.push_back(cpu.node);
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());

  std::vector<int> chosen;
  const auto take = [&](size_t index) {
    chosen.push_back(free[index].id);
    free.erase(free.begin() + static_cast<std::ptrdiff_t>(index));
  };
  for (int pool = 0; pool < pools; ++pool) {
    const int node = nodes[static_cast<size_t>(pool) % nodes.size()];
    int wanted = threads / pools + (pool < threads % pools ? 1 : 0);
    for (size_t i = 0; i < free.size() && wanted > 0;) {
      if (free[i].node == node) {
        take(i);
        --wanted;
      } else {
        ++i;
      }
    }
  }
  // A node with too few CPUs leaves its share to the others.
  while (static_cast<int>(chosen.size()) < threads && !free.empty()) take(0);
  return chosen;
}

}  // namespace kt
