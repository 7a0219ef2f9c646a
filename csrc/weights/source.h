// Reading rows of a checkpoint matrix as float.
#pragma once

#include "weights/quantize.h"

namespace kt {

// Dequantises row `row` into out[k] and gives its largest magnitude. Throws std::invalid_argument
// for an infinity or NaN.
float read_source_row(const SourceMatrix& source, const QuantizeKernels& kernels, int64_t row,
                      float* out);

}  // namespace kt
