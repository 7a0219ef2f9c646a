// Reading rows of a checkpoint matrix as float.
#pragma once

#include "weights/quantize.h"

namespace kt {

// Dequantises row `row` into out[k]. Throws std::invalid_argument for an infinity or NaN.
void read_source_row(const SourceMatrix& source, int64_t row, float* out);

}  // namespace kt
