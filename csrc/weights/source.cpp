#include "weights/source.h"

#include <cmath>

#include "base/error.h"
#include "base/float_formats.h"

namespace kt {
namespace {

constexpr int64_t kFp8Block = 128;  // quantization_config.weight_block_size of V3 checkpoints

void read_fp8_row(const SourceMatrix& source, int64_t row, float* out) {
  const auto& decode = fp8_e4m3_table();
  const uint8_t* bytes = static_cast<const uint8_t*>(source.data) + row * source.k;
  const int64_t blocks = (source.k + kFp8Block - 1) / kFp8Block;
  const float* scales = source.block_scales + row / kFp8Block * blocks;
  for (int64_t i = 0; i < source.k; ++i) out[i] = decode[bytes[i]] * scales[i / kFp8Block];
}

}  // namespace

void read_source_row(const SourceMatrix& source, int64_t row, float* out) {
  const int64_t begin = row * source.k;
  switch (source.dtype) {
    case SourceDtype::kFp8E4m3:
      read_fp8_row(source, row, out);
      break;
    case SourceDtype::kBf16:
      for (int64_t i = 0; i < source.k; ++i)
        out[i] = bf16_to_float(static_cast<const uint16_t*>(source.data)[begin + i]);
      break;
    case SourceDtype::kFp16:
      for (int64_t i = 0; i < source.k; ++i)
        out[i] = fp16_to_float(static_cast<const uint16_t*>(source.data)[begin + i]);
      break;
    case SourceDtype::kFp32:
      for (int64_t i = 0; i < source.k; ++i)
        out[i] = static_cast<const float*>(source.data)[begin + i];
      break;
  }
  float poison = 0.0f;
  for (int64_t i = 0; i < source.k; ++i) poison += out[i] * 0.0f;
  if (poison == 0.0f) return;
  for (int64_t i = 0; i < source.k; ++i) {
    if (!std::isfinite(out[i]))
      fail_argument("weight at row ", row, ", column ", i, " is ", out[i],
                    ": expected a finite value");
  }
}

}  // namespace kt
