// What the products work on: panels of weights and quantised rows of activations. Plain data and
// <cstdint> only, like targets/kernels.h.
#pragma once

#include <cstdint>

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

constexpr int kRowPadding = 32;

// Quantised activation rows of the tokens of one expert: row i starts at data + i * stride bytes,
// and kRowTailBytes behind it are its Outliers'.
// At least kRowPadding further rows may be read (their results are dropped), so that kernels can
// work in whole blocks.
struct Rows {
  const uint8_t* data;
  int64_t stride;
  const RowScale* scales;
};

}  // namespace kt
