#include <dlfcn.h>
#include <pybind11/stl.h>

#include <string_view>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "isa/features.h"
#include "numa/topology.h"
#include "targets/dispatch.h"

namespace py = pybind11;

namespace kt {

void bind_machine(py::module_& module) {
  module.def("targets", [] {
    std::vector<std::pair<std::string, bool>> list;
    for (const Target& target : targets())
      list.emplace_back(target.kernels->name, target.supported);
    return list;
  });
  module.def(
      "resolve_target", [](const std::string& name) { return std::string(find_target(name).name); },
      py::arg("name"));
  module.def("assume_target_supported", &assume_target_supported, py::arg("name"));
  module.def(
      "replace_target",
      [](uintptr_t address) {
        // Anything else would be called: it has to be a target's table in a loaded library.
        Dl_info found;
        const void* const at = checked_address(address, "a target's table");
        if (dladdr(at, &found) == 0 || found.dli_saddr != at || found.dli_sname == nullptr ||
            !std::string_view(found.dli_sname).ends_with("7kernelsE"))
          fail_argument("there is no target's table at ", address);
        replace_target(*static_cast<const Kernels*>(at));
      },
      py::arg("address"));
  module.def("cpu_features", [] { return list_features(); });
  module.def("cpu_brand", [] { return cpu_features().brand; });
  module.def("allowed_cpus", [] {
    std::vector<std::tuple<int, int, int>> list;
    for (const Cpu& cpu : allowed_cpus()) list.emplace_back(cpu.id, cpu.node, cpu.core_rank);
    return list;
  });
  module.def(
      "choose_cpus",
      [](const std::vector<std::tuple<int, int, int>>& cpus, int threads, int pools) {
        std::vector<Cpu> list;
        for (const auto& [id, node, core_rank] : cpus) list.push_back({id, node, core_rank});
        return choose_cpus(list, threads, pools);
      },
      py::arg("cpus"), py::arg("threads"), py::arg("pools"));
}

}  // namespace kt
