#include "weights/source.h"

#include <cmath>

#include "base/error.h"
#include "base/float_formats.h"

namespace kt {
namespace {

constexpr int64_t kFp8Block = 128;  // quantization_config.weight_block_size of V3 checkpoints

}  // namespace

float read_source_row(const SourceMatrix& source, const QuantizeKernels& kernels, int64_t row,
                      float* out) {
  const int64_t begin = row * source.k;
  switch (source.dtype) {
    case SourceDtype::kFp8E4m3:
      kernels.decode_fp8(
          static_cast<const uint8_t*>(source.data) + begin,
          source.block_scales + row / kFp8Block * ((source.k + kFp8Block - 1) / kFp8Block),
          source.k, out);
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
  const float largest = bits_to_float(kernels.largest_bits(out, source.k));
  if (std::isfinite(largest)) return largest;
  for (int64_t i = 0; i < source.k; ++i) {
    if (!std::isfinite(out[i]))
      fail_argument("weight at row ", row, ", column ", i, " is ", out[i],
                    ": expected a finite value");
  }
  return largest;  // not reached: one weight is not finite
}

}  // namespace kt
