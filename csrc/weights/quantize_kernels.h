// What a target implements for the packer: a table of functions over rows. Plain data and <cstdint>
// only, like targets/kernels.h.
#pragma once

#include <cstdint>

#include "weights/layout.h"

namespace kt {

// The search for a block's table. Blocks fall into classes by spread and crest; a class has a list
// of candidate tables and, for each bin of a weight's value, the error under each candidate.
// Made by table_search() in quantize.cpp. Normalised weights are int16 in units of 1/256: a row's
// largest magnitude is 127 * 256.
struct TableSearch {
  static constexpr int kSpreads = 9;
  static constexpr int kCrests = 4;
  static constexpr int kClasses = kSpreads * kCrests;
  static constexpr int kCandidates = 64;
  static constexpr int kBins = 384;

  int32_t spread_edges[kSpreads - 1];            // of the sum of x * x >> 16
  float crest_edges[kSpreads][kCrests - 1];      // of (max |x| >> 4)^2 over that sum
  uint8_t candidates[kClasses][kCandidates];     // numbers of tables
  int16_t bin_factor[kClasses];                  // bin = kBins / 2 + (x * factor >> 16), clamped
  int16_t thresholds[kNumTables][kTableLevels];  // midpoints between levels; the last is unused
  int8_t levels[kNumTables][kTableLevels];
  alignas(64) uint8_t errors[kClasses][kBins][kCandidates];
};

// Four rows of normalised weights, `k` apart, and where their panel's bytes go.
struct EncodeTask {
  const int16_t* rows;
  int64_t k;
  int lane;                // which four of the panel's 16 rows
  uint8_t* codes;          // of the panel
  uint8_t* index;          // of the panel
  int64_t wq[kBlockRows];  // out: sum of x * level of each row
  int64_t qq[kBlockRows];  // out: sum of level * level
};

// k is a multiple of 64 everywhere.
struct QuantizeKernels {
  // out[i] = bytes[i] * scales[i / 128]
  void (*decode_fp8)(const uint8_t* bytes, const float* scales, int64_t k, float* out);
  // Bit pattern of the largest |row[i]|; infinities and NaNs are larger than all finite ones.
  uint32_t (*largest_bits)(const float* row, int64_t k);
  // out[i] = row[i] * factor, to nearest even; products must fit.
  void (*round_row)(const float* row, int64_t k, float factor, int16_t* out);
  // 16 rows of int8 levels, `k` apart, to a panel's k-steps.
  void (*interleave)(const int16_t* rows, int64_t k, uint8_t* codes);
  void (*encode[kNumMethods])(const TableSearch& search,
                              EncodeTask& task);  // null without tables
};

}  // namespace kt
