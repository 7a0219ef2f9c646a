// What a worker gives a kernel to do. Plain data and <cstdint> only, like targets/kernels.h.
#pragma once

#include <cstdint>

#include "gemm/operands.h"

namespace kt {

// h[i][16 * panel + r] = silu(gate_r . x_i) * (up_r . x_i) for `count` tokens of one expert, for
// `panels` consecutive panels from `panel`.
struct GateUpTask {
  Matrix gate;
  Matrix up;
  const uint8_t* tables;  // prepared by prepare_tables; null for int8
  int64_t panel;
  int64_t panels;
  Rows x;
  int64_t count;
  float* h;  // [count] rows, h_stride floats apart
  int64_t h_stride;
  uint8_t* workspace;  // this worker's, 64-byte aligned
};

// out[tokens[i]][16 * panel + r] += weights[i] * (down_r . h_i) for `count` tokens of one expert,
// for `panels` consecutive panels from `panel`.
struct DownTask {
  Matrix down;
  const uint8_t* tables;
  int64_t panel;
  int64_t panels;
  Rows h;                 // rows 0..count-1
  const int32_t* tokens;  // [count], row of out
  const float* weights;   // [count], routing weight
  int64_t count;
  float* out;  // rows out_stride floats apart
  int64_t out_stride;
  uint8_t* workspace;
};

}  // namespace kt
