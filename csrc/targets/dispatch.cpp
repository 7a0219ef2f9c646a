#include "targets/dispatch.h"

#include "base/error.h"
#include "isa/features.h"

namespace kt {

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

const std::vector<Target>& targets() {
  static const std::vector<Target> list = {
      {&avx512_vnni::kernels, cpu_features().avx512_vnni, true},
      {&avx2::kernels, cpu_features().avx2, true},
      {&scalar::kernels, true, true},
      {&reference::kernels, true, false},
  };
  return list;
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
