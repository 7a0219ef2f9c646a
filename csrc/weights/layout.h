// The packed format in memory: sizes and offsets. docs/weight-format.md describes it byte by byte;
// kt_kernel/packed.py knows the same for files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kt {

constexpr int64_t kPanelRows = 16;  // output rows of a panel: lanes of a 512-bit int32 accumulator
constexpr int64_t kBlockRows = 4;   // rows of a table block: a 16-byte lane holds 4 rows x 4 k
constexpr int64_t kDimMultiple = 64;
constexpr int64_t kMaxDim = 131072;  // sums over k of 128 * 127 fit int32
constexpr int kNumTables = 256;
constexpr int kTableLevels = 16;

// int4 with a table for each 4 x 16 or 4 x 8 weights, int8.
enum class Method : uint8_t { kInt4, kInt4Block8, kInt8 };
constexpr int kNumMethods = 3;

// k extent of a table block, 0 where there are no tables.
constexpr int64_t block_k(Method method) {
  return method == Method::kInt4 ? 16 : method == Method::kInt4Block8 ? 8 : 0;
}
constexpr bool is_int4(Method method) { return block_k(method) > 0; }

// Sizes in bytes of one projection [n, k] of one expert.
struct ProjectionLayout {
  int64_t n = 0;
  int64_t k = 0;
  Method method = Method::kInt4;

  int64_t panels() const { return n / kPanelRows; }
  // int4: [k/8][64], two k-steps of 4 share 64 bytes. int8: [k/4][64].
  int64_t codes_per_panel() const { return is_int4(method) ? k * 8 : k * 16; }
  // [k/block_k][4]: one byte for each of the panel's four lanes.
  int64_t index_per_panel() const { return is_int4(method) ? k / block_k(method) * 4 : 0; }
  int64_t codes_bytes() const { return panels() * codes_per_panel(); }
  int64_t index_bytes() const { return panels() * index_per_panel(); }
  int64_t scales_bytes() const { return n * static_cast<int64_t>(sizeof(uint16_t)); }
};

}  // namespace kt
