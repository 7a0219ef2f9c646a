// What a target (one ISA) implements: a table of functions over ranges. Plain data and <cstdint>
// only, because target files are compiled for their ISA and must not instantiate anything that the
// linker could pick for the rest of the program.
#pragma once

#include <cstdint>

#include "weights/quantize_kernels.h"

namespace kt {

// Scale and sum of one quantised activation row: x ~ scale * q. `sum` is the sum of q, which
// targets that multiply by offset weights (w + 128) subtract 128 times.
struct RowScale {
  float scale;
  int32_t sum;
  int32_t outlier_steps;  // 0 in ordinary rows
};

// A second term, in a few steps of 4 k, for a row whose few largest values would leave all others
// too coarse a step: there x ~ row scale * row q + scale * q. It lies behind the row's q.
constexpr int kMaxOutlierSteps = 16;
struct Outliers {
  float scale;
  int32_t sum;                                // of q
  uint16_t step[kMaxOutlierSteps];            // ascending; step s is k = 4 s .. 4 s + 3
  alignas(16) int8_t q[kMaxOutlierSteps][4];  // 0 where x is none
};
constexpr int64_t kRowTailBytes = 128;
static_assert(sizeof(Outliers) <= kRowTailBytes);

// One projection of one expert, or one panel of it (layout.h).
struct Matrix {
  const uint8_t* codes;
  const uint8_t* table_index;  // null for int8
  const uint16_t* scales;      // [n] bf16
  int64_t k;
  int64_t codes_per_panel;
  int64_t index_per_panel;
};

// Quantised activation rows of the tokens of one expert: row i starts at data + i * stride bytes,
// and kRowTailBytes behind it are its Outliers'.
// At least kRowPadding further rows may be read (their results are dropped), so that kernels can
// work in whole blocks.
struct Rows {
  const uint8_t* data;
  int64_t stride;
  const RowScale* scales;
};

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

constexpr int kRowPadding = 32;

struct Kernels {
  const char* name;
  int activation_bytes;     // bytes of one quantised activation: 1, or 4 in the reference target
  int64_t workspace_bytes;  // of one worker, a multiple of 64
  void (*prepare_tables)(const int8_t* tables, uint8_t* prepared);  // both [256][16]
  // q has room for k activations and the tail.
  void (*quantize_f32)(const float* x, int64_t k, uint8_t* q, RowScale* scale);
  void (*quantize_bf16)(const uint16_t* x, int64_t k, uint8_t* q, RowScale* scale);
  void (*gate_up[kNumMethods])(const GateUpTask&);  // by Method (layout.h)
  void (*down[kNumMethods])(const DownTask&);
  void (*store_bf16)(const float* x, int64_t n, uint16_t* out);  // round to nearest even
  QuantizeKernels quantize;
};

}  // namespace kt
