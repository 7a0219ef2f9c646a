// Which target runs: implementations as a list in priority order.
#pragma once

#include <string>
#include <vector>

#include "targets/kernels.h"

namespace kt {

struct Target {
  const Kernels* kernels;
  bool supported;  // on this machine
  bool automatic;  // may be chosen without being named
};

// All targets, best first.
const std::vector<Target>& targets();

// Tests that emulate the instructions of a target may run it by name from then on. Throws
// std::invalid_argument for an unknown name.
void assume_target_supported(const std::string& name);

// Tests that compile a target otherwise run it in place of the built one of its name: from then on,
// when it is named. Throws std::invalid_argument for an unknown name.
void replace_target(const Kernels& kernels);

// The target of that name, or the best one for "". Throws std::invalid_argument for a name that is
// unknown or that this machine cannot run, with the list of those it can.
const Kernels& find_target(const std::string& name);

}  // namespace kt
