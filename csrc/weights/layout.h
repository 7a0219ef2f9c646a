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

// The methods, a row each: its name, the bits of a code and the k of a table block, 0 where codes
// are levels and there are no tables. What there is for each method is made of these rows, in their
// order.
#define KT_METHODS(ROW)              \
  ROW(kInt4, "int4", 4, 16)          \
  ROW(kInt4Block8, "int4-4x8", 4, 8) \
  ROW(kInt8, "int8", 8, 0)

#define KT_ROW(method, name, bits, block_k) method,
enum class Method : uint8_t { KT_METHODS(KT_ROW) };
#undef KT_ROW

struct MethodRow {
  const char* name;
  int64_t bits;
  int64_t block_k;
};
#define KT_ROW(method, name, bits, block_k) {name, bits, block_k},
constexpr MethodRow kMethods[] = {KT_METHODS(KT_ROW)};  // by Method
#undef KT_ROW
constexpr int kNumMethods = sizeof kMethods / sizeof kMethods[0];

constexpr int64_t block_k(Method method) { return kMethods[static_cast<int>(method)].block_k; }
constexpr bool has_tables(Method method) { return block_k(method) > 0; }

// The packer and the kernels know these two kinds of codes: 4 bits that choose a table's level, and
// levels of 8 bits.
#define KT_ROW(method, name, bits, block_k) \
  static_assert((block_k) > 0 ? (bits) == 4 : (bits) == 8);
KT_METHODS(KT_ROW)
#undef KT_ROW

// Sizes in bytes of one projection [n, k] of one expert.
struct ProjectionLayout {
  int64_t n = 0;
  int64_t k = 0;
  Method method = Method::kInt4;

  int64_t panels() const { return n / kPanelRows; }
  // 4 bits: [k/8][64], two k-steps of 4 share 64 bytes. 8 bits: [k/4][64].
  int64_t codes_per_panel() const {
    return k * kPanelRows * kMethods[static_cast<int>(method)].bits / 8;
  }
  // [k/block_k][4]: one byte for each of the panel's four lanes.
  int64_t index_per_panel() const { return has_tables(method) ? k / block_k(method) * 4 : 0; }
  int64_t codes_bytes() const { return panels() * codes_per_panel(); }
  int64_t index_bytes() const { return panels() * index_per_panel(); }
  int64_t scales_bytes() const { return n * static_cast<int64_t>(sizeof(uint16_t)); }
};

}  // namespace kt
