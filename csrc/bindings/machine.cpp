#include <dlfcn.h>
#include <pybind11/stl.h>

#include <string_view>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "isa/features.h"
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
        const void* const table = checked_address(address, "a target's table");
        if (dladdr(table, &found) == 0 || found.dli_saddr != table || found.dli_sname == nullptr ||
            !std::string_view(found.dli_sname).ends_with("7kernelsE"))
          fail_argument("there is no target's table at ", address);
        replace_target(*static_cast<const Kernels*>(table));
      },
      py::arg("address"));
  module.def("cpu_features", [] { return list_features(); });
  module.def("cpu_brand", [] { return cpu_features().brand; });
}

}  // namespace kt
