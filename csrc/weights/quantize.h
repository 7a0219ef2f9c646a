// One projection of one expert: checkpoint weights -> packed panels, and back.
// docs/weight-format.md gives the format and the error of each method.
#pragma once

#include <cstdint>

#include "weights/layout.h"
#include "weights/quantize_kernels.h"

namespace kt {

enum class SourceDtype : uint8_t { kFp8E4m3, kBf16, kFp16, kFp32 };

// A row-major [n, k] matrix as it lies in a checkpoint. FP8 comes with the inverse scale of each
// 128 x 128 block, row-major [ceil(n / 128), ceil(k / 128)]; others have none.
struct SourceMatrix {
  const void* data = nullptr;
  SourceDtype dtype = SourceDtype::kFp32;
  const float* block_scales = nullptr;
  int64_t n = 0;
  int64_t k = 0;
};

// Where the packed projection goes; sizes from ProjectionLayout. table_index is null for int8.
struct PackedProjection {
  uint8_t* codes = nullptr;
  uint8_t* table_index = nullptr;
  uint16_t* scales = nullptr;  // bf16
};

// The 256 tables of 16 levels that new weights of a method with tables are encoded with.
const int8_t (&int4_tables(Method method))[kNumTables][kTableLevels];

// The same bytes whatever target the kernels are of. Throws std::invalid_argument for an infinity
// or NaN in the source, naming the row and column.
void quantize_projection(const SourceMatrix& source, Method method, const QuantizeKernels& kernels,
                         const PackedProjection& out);

// The weights that the packed form stands for, row-major [n, k]. `tables` is [256][16].
void dequantize_projection(const ProjectionLayout& layout, const uint8_t* codes,
                           const uint8_t* table_index, const uint16_t* scales, const int8_t* tables,
                           float* weights);

}  // namespace kt
