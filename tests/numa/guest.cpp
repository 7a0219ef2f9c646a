// Loads a layer file in two slices, runs calls, and prints a hash of each output and on which NUMA
// node each slice's pages lie. It is the only program of a virtual machine, and runs on its host
// for comparison.
//
//   guest FILE EXPERTS TOP_K HIDDEN INTERMEDIATE int4|int8 TABLES OFFSET{9} CPUS{2}
//
// TABLES is the offset of the tables in the file (0 for int8), OFFSETs those of codes, table_index
// and scales of gate, up and down, CPUS those of a slice's workers, such as 0,1.

#include <algorithm>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "moe/layer_job.h"
#include "targets/dispatch.h"

namespace {

constexpr int kSlices = 2;

// "0,1" -> {0, 1}
std::vector<int> cpus_in(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) cpus.push_back(std::stoi(word));
  return cpus;
}

uint32_t random_bits(uint32_t& state) { return state = state * 1664525 + 1013904223; }

// FNV-1a of a layer's output for made-up inputs.
uint64_t output_hash(kt::Layer& layer, int64_t tokens) {
  const kt::LayerConfig& c = layer.config();
  uint32_t state = static_cast<uint32_t>(tokens);
  std::vector<float> x(static_cast<size_t>(tokens * c.hidden_size));
  for (float& value : x) value = static_cast<float>(random_bits(state) >> 8) * 0x1p-23f - 1.0f;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t first = random_bits(state) >> 8;
    for (int64_t j = 0; j < c.top_k; ++j) {
      ids.push_back(static_cast<int32_t>((first + static_cast<uint64_t>(j)) %
                                         static_cast<uint64_t>(c.num_experts)));
      weights.push_back(static_cast<float>(random_bits(state) >> 8) * 0x1p-24f);
    }
  }
  const auto out = std::make_shared<std::vector<float>>(x.size());
  const kt::CallInputs inputs{x.data(), kt::ActivationDtype::kFp32, tokens,
                              kt::ExpertIds{ids.data()}, weights.data()};
  const kt::CallOutput output{{out, out->data()}, kt::ActivationDtype::kFp32, nullptr};
  kt::WorkerPool::wait(*layer.submit(inputs, output, 0).job);
  uint64_t hash = 0xcbf29ce484222325;
  const auto* bytes = reinterpret_cast<const uint8_t*>(out->data());
  for (size_t i = 0; i < out->size() * sizeof(float); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

// Pages of the memory on each node; -1 for those that have no memory yet.
std::map<int, int> pages_of_nodes(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kPage = kt::Buffer::kSmallPage;
  std::vector<void*> pages;
  for (int64_t i = 0; i < bytes; i += kPage) pages.push_back(const_cast<uint8_t*>(data) + i);
  std::vector<int> nodes(pages.size());
  // A huge page that the kernel is just making has no node for a moment: asked again.
  for (int tries = 0; tries < 50; ++tries) {
    if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) != 0)
      kt::fail_runtime("move_pages failed");
    if (*std::min_element(nodes.begin(), nodes.end()) >= 0) break;
    usleep(20000);
  }
  std::map<int, int> count;
  for (int node : nodes) ++count[node < 0 ? -1 : node];
  return count;
}

void run(const std::vector<std::string>& arguments) {
  const auto number = [&](size_t i) { return std::stoll(arguments.at(i)); };
  const bool int4 = arguments.at(5) == "int4";
  const kt::LayerConfig config{number(1), number(2), number(3), number(4),
                               int4 ? kt::Method::kInt4 : kt::Method::kInt8};
  std::vector<std::vector<int>> groups;
  for (size_t i = 16; i < arguments.size(); ++i) groups.push_back(cpus_in(arguments[i]));
  for (size_t g = 0; g < groups.size(); ++g)
    std::printf("group %zu: %zu workers\n", g, groups[g].size());
  const kt::Kernels& kernels = kt::find_target("");
  std::printf("target %s\n", kernels.name);
  kt::Layer layer(config, std::make_shared<kt::Engine>(groups, kSlices, kernels));

  std::array<kt::FileOffsets, 3> offsets;
  for (size_t i = 0; i < 9; ++i) offsets[i / 3][i % 3] = number(7 + i);
  std::vector<int8_t> tables(kt::kNumTables * kt::kTableLevels);
  if (int4) {
    std::FILE* file = std::fopen(arguments[0].c_str(), "rb");
    if (file == nullptr || std::fseek(file, number(6), SEEK_SET) != 0 ||
        std::fread(tables.data(), 1, tables.size(), file) != tables.size())
      kt::fail_runtime("cannot read the tables");
    std::fclose(file);
  }
  std::vector<int64_t> source;
  for (int64_t i = 0; i < config.num_experts; ++i) source.push_back(i);
  layer.load_file(arguments[0], offsets, tables.data(), source);

  for (int64_t tokens : {1, 8, 40})
    std::printf("output of %lld: %016llx\n", static_cast<long long>(tokens),
                static_cast<unsigned long long>(output_hash(layer, tokens)));
  for (size_t s = 0; s < layer.slices().size(); ++s) {
    const kt::Slice& slice = layer.slices()[s];
    const int64_t bytes = config.num_experts * slice.slot_bytes();
    for (const auto& [node, pages] : pages_of_nodes(slice.weights().data(), bytes))
      std::printf("slice %zu: node %d: %d pages\n", s, node, pages);
  }
  std::printf("done\n");
}

}  // namespace

int main(int argc, char** argv) {
  const bool alone = getpid() == 1;  // a virtual machine's only program
  if (alone) {
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("proc", "/proc", "proc", 0, nullptr);
    mount("sysfs", "/sys", "sysfs", 0, nullptr);
  }
  int status = 0;
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    status = 1;
  }
  std::fflush(stdout);
  if (alone) reboot(RB_POWER_OFF);
  return status;
}
