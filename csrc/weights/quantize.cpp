#include "weights/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "base/float_formats.h"
#include "weights/source.h"

namespace kt {
namespace {

using Int4Tables = int8_t[kNumTables][kTableLevels];

constexpr Int4Tables kTables4x16 = {
#include "weights/int4_tables_4x16.inc"
};
constexpr Int4Tables kTables4x8 = {
#include "weights/int4_tables_4x8.inc"
};

float absmax(const float* row, int64_t k) {
  float top = 0.0f;
  for (int64_t i = 0; i < k; ++i) top = std::max(top, std::fabs(row[i]));
  return top;
}

// row / divisor, for divisor > 0.
void divide_row(float* row, int64_t k, double divisor) {
  const auto inverse = static_cast<float>(1.0 / divisor);
  if (std::isfinite(inverse)) {
    for (int64_t i = 0; i < k; ++i) row[i] *= inverse;
  } else {  // near the subnormals the inverse overflows float
    for (int64_t i = 0; i < k; ++i) row[i] = static_cast<float>(row[i] / divisor);
  }
}

// ---- int4
// ----------------------------------------------------------------------------------------
//
// A normalised weight falls into one of kBins bins; kErrors[bin][table] is the squared error of
// that bin's centre under each table's nearest level. A block's error under all 256 tables is then
// a sum of as many rows as it has weights, and the smallest names its table. Exhaustive over
// tables, and only float adds in a fixed order for each table, so the choice is the same on every
// ISA.

constexpr int kBins = 1024;

// Finer near zero, where the levels of small-scale tables are close: bin = 512 + 512 sign
// sqrt|x/127|.
int bin_of(float x) {
  const float root = std::sqrt(std::fabs(x) * (1.0f / 127.0f));
  const int offset = std::min(511, static_cast<int>(root * 512.0f));
  return x < 0.0f ? 511 - offset : 512 + offset;
}

float bin_centre(int bin) {
  const int offset = bin < 512 ? 511 - bin : bin - 512;
  const float root = (static_cast<float>(offset) + 0.5f) / 512.0f;
  const float x = root * root * 127.0f;
  return bin < 512 ? -x : x;
}

struct TableSearch {
  using Errors = std::array<std::array<float, kNumTables>, kBins>;
  const Int4Tables& tables;
  std::unique_ptr<Errors> errors = std::make_unique<Errors>();
  // Midpoints between the ascending levels of each table.
  float thresholds[kNumTables][kTableLevels - 1];

  explicit TableSearch(const Int4Tables& t) : tables(t) {
    for (int t = 0; t < kNumTables; ++t)
      for (int l = 0; l + 1 < kTableLevels; ++l)
        thresholds[t][l] = 0.5f * static_cast<float>(tables[t][l] + tables[t][l + 1]);
    for (int bin = 0; bin < kBins; ++bin) {
      const float x = bin_centre(bin);
      for (int t = 0; t < kNumTables; ++t) {
        const float d = x - static_cast<float>(tables[t][nearest(t, x)]);
        (*errors)[bin][t] = d * d;
      }
    }
  }

  int nearest(int table, float x) const {
    int level = 0;
    for (int l = 0; l < kTableLevels - 1; ++l) level += x > thresholds[table][l];
    return level;
  }
};

const TableSearch& table_search(Method method) {
  static const TableSearch of_4x16(kTables4x16), of_4x8(kTables4x8);
  return method == Method::kInt4 ? of_4x16 : of_4x8;
}

// Wider vectors where the CPU has them: lanes are independent tables, so the result is the same.
#define KT_WIDE_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))

// Explicit vectors: left to itself the compiler adds one table at a time.
using Floats16 = float __attribute__((vector_size(64), aligned(4), may_alias));

// totals[t] = sum of the block's errors under table t, a group of tables at a time in registers.
KT_WIDE_VECTORS
void sum_errors(const float* errors, const int32_t* bins, int count, float (&totals)[kNumTables]) {
  constexpr int kLanes = 16, kVectors = 4;
  for (int first = 0; first < kNumTables; first += kLanes * kVectors) {
    Floats16 sums[kVectors] = {};
    for (int i = 0; i < count; ++i) {
      const auto* row = reinterpret_cast<const Floats16*>(errors + bins[i] * kNumTables + first);
      for (int v = 0; v < kVectors; ++v) sums[v] += row[v];
    }
    std::memcpy(totals + first, sums, sizeof sums);
  }
}

// The table with the least error for a block of normalised weights.
template <int Weights>
int best_table(const TableSearch& search, const float (&block)[Weights]) {
  int32_t bins[Weights];
  for (int i = 0; i < Weights; ++i) bins[i] = bin_of(block[i]);
  float totals[kNumTables];
  sum_errors((*search.errors)[0].data(), bins, Weights, totals);
  return static_cast<int>(std::min_element(totals, totals + kNumTables) - totals);
}

// codes[i] = the level of the table that is nearest to block[i].
KT_WIDE_VECTORS
void nearest_codes(const float (&thresholds)[kTableLevels - 1], const float* block, int count,
                   int32_t* codes) {
  std::fill_n(codes, count, 0);
  for (float threshold : thresholds)
    for (int i = 0; i < count; ++i) codes[i] += block[i] > threshold;
}

// rows[4] are normalised; writes the lane's index bytes and nibbles of one panel, and adds each
// row's w*q and q*q products for the least-squares scale.
template <int BlockK>
void encode_lane(const TableSearch& search, const float* const (&rows)[kBlockRows], int64_t k,
                 int lane, uint8_t* codes, uint8_t* index, double (&wq)[kBlockRows],
                 double (&qq)[kBlockRows]) {
  constexpr int kWeights = kBlockRows * BlockK;
  for (int64_t b = 0; b < k / BlockK; ++b) {
    float block[kWeights];
    for (int r = 0; r < kBlockRows; ++r)
      std::copy_n(rows[r] + b * BlockK, BlockK, block + r * BlockK);
    const int table = best_table(search, block);
    index[4 * b + lane] = static_cast<uint8_t>(table);
    int32_t nearest[kWeights];
    nearest_codes(search.thresholds[table], block, kWeights, nearest);
    for (int r = 0; r < kBlockRows; ++r) {
      for (int j = 0; j < BlockK; ++j) {
        const float x = block[r * BlockK + j];
        const int code = nearest[r * BlockK + j];
        const double q = search.tables[table][code];
        wq[r] += x * q;
        qq[r] += q * q;
        // 8 k share 64 bytes: the first four in the low nibbles, the others in the high ones.
        uint8_t& byte = codes[(b * (BlockK / 8) + j / 8) * 64 + 16 * lane + 4 * r + j % 4];
        byte |= static_cast<uint8_t>(code << (j % 8 < 4 ? 0 : 4));
      }
    }
  }
}

void quantize_int4(const SourceMatrix& source, const ProjectionLayout& layout,
                   const PackedProjection& out) {
  const TableSearch& search = table_search(layout.method);
  const auto encode = layout.method == Method::kInt4 ? encode_lane<16> : encode_lane<8>;
  std::vector<float> rows(kBlockRows * layout.k);
  std::memset(out.codes, 0, layout.codes_bytes());
  for (int64_t first = 0; first < layout.n; first += kBlockRows) {
    const float* normalised[kBlockRows];
    float top[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      float* row = rows.data() + r * layout.k;
      read_source_row(source, first + r, row);
      top[r] = absmax(row, layout.k);
      if (top[r] > 0.0f) divide_row(row, layout.k, top[r] / 127.0);
      normalised[r] = row;
    }
    const int64_t panel = first / kPanelRows;
    double wq[kBlockRows] = {}, qq[kBlockRows] = {};
    encode(search, normalised, layout.k, static_cast<int>(first % kPanelRows / kBlockRows),
           out.codes + panel * layout.codes_per_panel(),
           out.table_index + panel * layout.index_per_panel(), wq, qq);
    // Given the codes, the scale that minimises |w - scale q|^2 is <w, q> / <q, q>.
    for (int r = 0; r < kBlockRows; ++r) {
      const double fit = qq[r] > 0.0 ? wq[r] / qq[r] : 1.0;
      out.scales[first + r] = float_to_bf16(static_cast<float>(top[r] / 127.0 * fit));
    }
  }
}

// ---- int8
// ----------------------------------------------------------------------------------------

void quantize_int8(const SourceMatrix& source, const ProjectionLayout& layout,
                   const PackedProjection& out) {
  std::vector<float> row(layout.k);
  for (int64_t n = 0; n < layout.n; ++n) {
    read_source_row(source, n, row.data());
    // Rounded up, so that the largest weight stays within 127 of the scale that is stored.
    out.scales[n] = float_to_bf16_up(absmax(row.data(), layout.k) / 127.0f);
    const float scale = bf16_to_float(out.scales[n]);
    if (scale > 0.0f) divide_row(row.data(), layout.k, scale);
    uint8_t* codes = out.codes + n / kPanelRows * layout.codes_per_panel() + n % kPanelRows * 4;
    for (int64_t i = 0; i < layout.k; ++i) {
      const auto q = static_cast<int8_t>(std::nearbyint(row[i]));
      codes[i / 4 * 64 + i % 4] = static_cast<uint8_t>(q);
    }
  }
}

}  // namespace

const int8_t (&int4_tables(Method method))
    [kNumTables][kTableLevels] { return method == Method::kInt4 ? kTables4x16 : kTables4x8; }

void quantize_projection(const SourceMatrix& source, Method method, const PackedProjection& out) {
  const ProjectionLayout layout{source.n, source.k, method};
  if (is_int4(method)) {
    quantize_int4(source, layout, out);
  } else {
    quantize_int8(source, layout, out);
  }
}

void dequantize_projection(const ProjectionLayout& layout, const uint8_t* codes,
                           const uint8_t* table_index, const uint16_t* scales, const int8_t* tables,
                           float* weights) {
  for (int64_t n = 0; n < layout.n; ++n) {
    const int64_t panel = n / kPanelRows;
    const int64_t row = n % kPanelRows;
    const float scale = bf16_to_float(scales[n]);
    const uint8_t* panel_codes = codes + panel * layout.codes_per_panel();
    const uint8_t* panel_index = table_index + panel * layout.index_per_panel();
    for (int64_t i = 0; i < layout.k; ++i) {
      int level;
      if (is_int4(layout.method)) {
        const uint8_t byte = panel_codes[i / 8 * 64 + row * 4 + i % 4];
        const int code = i % 8 < 4 ? byte & 15 : byte >> 4;
        level =
            tables[panel_index[i / block_k(layout.method) * 4 + row / kBlockRows] * kTableLevels +
                   code];
      } else {
        level = static_cast<int8_t>(panel_codes[i / 4 * 64 + row * 4 + i % 4]);
      }
      weights[n * layout.k + i] = static_cast<float>(level) * scale;
    }
  }
}

}  // namespace kt
