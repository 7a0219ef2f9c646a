// Names of methods and dtypes as Python spells them.
#pragma once

#include <string>

#include "base/error.h"
#include "weights/quantize.h"

namespace kt {

inline Method parse_method(const std::string& name) {
  if (name == "int4") return Method::kInt4;
  if (name == "int4-4x8") return Method::kInt4Block8;
  if (name == "int8") return Method::kInt8;
  fail_argument("unknown method '", name, "': expected int4, int4-4x8 or int8");
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
