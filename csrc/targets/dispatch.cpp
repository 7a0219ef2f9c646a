#include "targets/dispatch.h"

#include "base/error.h"
#include "isa/features.h"

namespace kt {

namespace amx {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace scalar {
extern const Kernels kernels;
}
namespace reference {
extern const Kernels kernels;
}

namespace {

bool amx_usable() {
  const CpuFeatures& f = cpu_features();
  return f.avx512_vnni && f.amx_int8 && f.amx_permitted;
}

std::vector<Target>& target_list() {
  static std::vector<Target> list = {
      {&amx::kernels, amx_usable(), true},
      {&avx512_vnni::kernels, cpu_features().avx512_vnni, true},
      {&avx2::kernels, cpu_features().avx2, true},
      {&scalar::kernels, true, true},
      {&reference::kernels, true, false},
  };
  return list;
}

Target& target_named(const std::string& name) {
  for (Target& target : target_list())
    if (name == target.kernels->name) return target;
  fail_argument("target '", name, "' is unknown");
}

}  // namespace

const std::vector<Target>& targets() { return target_list(); }

void assume_target_supported(const std::string& name) {
  Target& target = target_named(name);
  target.automatic = target.automatic && target.supported;
  target.supported = true;
}

void replace_target(const Kernels& kernels) {
  target_named(kernels.name) = {&kernels, true, false};
}

const Kernels& find_target(const std::string& name) {
  std::string usable;
  bool known = false;
  for (const Target& target : targets()) {
    const bool match = name.empty() ? target.automatic : name == target.kernels->name;
    if (match && target.supported) return *target.kernels;
    known = known || match;
    if (target.supported)
      usable += (usable.empty() ? "" : ", ") + std::string(target.kernels->name);
  }
  fail_argument("target '", name, "' is ", known ? "not supported by this CPU" : "unknown",
                ": expected one of ", usable);
}

}  // namespace kt
