// Checked errors: the core never prints and never aborts, it throws with the value found and the
// value expected. Not for target files (they hold no exceptions).
#pragma once

#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kt {

// No iostreams: their locale facets crash when another library of the process brings a libstdc++
// of its own.
inline void append_text(std::string& text, std::string_view part) { text += part; }
template <std::integral T>
void append_text(std::string& text, T part) {
  text += std::to_string(part);
}
inline void append_text(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  text += digits;
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append_text(text, parts), ...);
  return text;
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
