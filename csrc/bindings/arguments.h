// What Python passes, checked: names of methods and dtypes, arrays, addresses.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "moe/layer.h"
#include "weights/quantize.h"

namespace kt {

inline Method parse_method(const std::string& name) {
  std::string names;
  for (int m = 0; m < kNumMethods; ++m) {
    if (name == kMethods[m].name) return static_cast<Method>(m);
    names += concat(m == 0 ? "" : m + 1 < kNumMethods ? ", " : " or ", kMethods[m].name);
  }
  fail_argument("unknown method '", name, "': expected ", names);
}

inline ActivationDtype parse_activation_dtype(const std::string& name) {
  if (name == "fp32") return ActivationDtype::kFp32;
  if (name == "bf16") return ActivationDtype::kBf16;
  fail_argument("unknown activation dtype '", name, "': expected bf16 or fp32");
}

inline SourceDtype parse_source_dtype(const std::string& name) {
  if (name == "fp8_e4m3") return SourceDtype::kFp8E4m3;
  if (name == "bf16") return SourceDtype::kBf16;
  if (name == "fp16") return SourceDtype::kFp16;
  if (name == "fp32") return SourceDtype::kFp32;
  fail_argument("unknown dtype '", name, "': expected fp8_e4m3, bf16, fp16 or fp32");
}

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const pybind11::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

// Throws std::invalid_argument unless the array has this shape and, without gaps, T as elements.
template <class T>
const T* checked_data(const pybind11::array& array, const std::vector<int64_t>& shape,
                      const char* name) {
  constexpr int kAligned = pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!pybind11::isinstance<pybind11::array_t<T>>(array))
    fail_argument(name, " is ", std::string(pybind11::str(array.dtype())), ", expected ",
                  std::string(pybind11::str(pybind11::dtype::of<T>())));
  if (shape_of(array) != shape)
    fail_argument(name, " has shape ", text_of(shape_of(array)), ", expected ", text_of(shape));
  if (!(array.flags() & pybind11::array::c_style) || !(array.flags() & kAligned))
    fail_argument(name, " has gaps or is not aligned: expected a C-contiguous array");
  return static_cast<const T*>(array.data());
}

// The bits of weights of that dtype.
inline const void* checked_weights(const pybind11::array& array, const std::vector<int64_t>& shape,
                                   SourceDtype dtype, const char* name) {
  switch (dtype) {
    case SourceDtype::kFp8E4m3:
      return checked_data<uint8_t>(array, shape, name);
    case SourceDtype::kFp32:
      return checked_data<float>(array, shape, name);
    case SourceDtype::kBf16:
    case SourceDtype::kFp16:
      return checked_data<uint16_t>(array, shape, name);
  }
  fail_argument(name, " has a dtype that this function does not know");
}

inline int64_t checked_deferred(int64_t count) {
  if (count < 0) fail_argument("deferred is ", count, ": expected at least 0");
  return count;
}

// On a device: all that can be told from here is that there is one.
inline const void* checked_address(uintptr_t address, const char* name) {
  if (address == 0) fail_argument(name, " is a null address");
  return reinterpret_cast<const void*>(address);
}

}  // namespace kt
