// Checked errors: the core never prints and never aborts, it throws with the value found and the
// value expected. Not for target files (they hold no exceptions).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kt {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Becomes Python's ValueError: the caller's arguments are wrong.
template <class... Parts>
[[noreturn]] void fail_argument(const Parts&... parts) {
  throw std::invalid_argument(concat(parts...));
}

// Becomes Python's RuntimeError: the system refused something.
template <class... Parts>
[[noreturn]] void fail_runtime(const Parts&... parts) {
  throw std::runtime_error(concat(parts...));
}

}  // namespace kt
