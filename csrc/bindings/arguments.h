// What Python passes: names of methods and dtypes, and tensors.
#pragma once

#include <string>

#include "base/error.h"
#include "moe/layer.h"
#include "weights/quantize.h"

namespace kt {

// Tensors arrive as addresses: this module is built without torch. kt_kernel/wrapper.py checks
// dtype, shape and contiguity before it passes one.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Method parse_method(const std::string& name) {
  if (name == "int4") return Method::kInt4;
  if (name == "int4-4x8") return Method::kInt4Block8;
  if (name == "int8") return Method::kInt8;
  fail_argument("unknown method '", name, "': expected int4, int4-4x8 or int8");
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

inline int64_t source_bytes(SourceDtype dtype) {
  switch (dtype) {
    case SourceDtype::kFp8E4m3:
      return 1;
    case SourceDtype::kFp32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace kt
