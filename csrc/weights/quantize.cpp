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

// As learn_candidates.py prints it.
struct Candidates {
  decltype(TableSearch::spread_edges) spread_edges;
  decltype(TableSearch::crest_edges) crest_edges;
  float reaches[TableSearch::kClasses];  // largest magnitude that the bins cover
  float units[TableSearch::kClasses];    // of the errors, squared
  decltype(TableSearch::candidates) lists;
};

constexpr Candidates kCandidates4x16 = {
#include "weights/int4_candidates_4x16.inc"
};
constexpr Candidates kCandidates4x8 = {
#include "weights/int4_candidates_4x8.inc"
};

struct Learned {
  const Int4Tables& tables;
  const Candidates& candidates;
};
constexpr Learned kLearned4x16 = {kTables4x16, kCandidates4x16};
constexpr Learned kLearned4x8 = {kTables4x8, kCandidates4x8};

// By the k of a method's table blocks; a row of KT_METHODS with another does not compile.
template <int64_t BlockK>
constexpr const Learned* learned();
template <>
constexpr const Learned* learned<0>() {
  return nullptr;  // no tables
}
template <>
constexpr const Learned* learned<8>() {
  return &kLearned4x8;
}
template <>
constexpr const Learned* learned<16>() {
  return &kLearned4x16;
}

#define KT_ROW(method, name, bits, block_k) learned<block_k>(),
constexpr const Learned* kLearned[] = {KT_METHODS(KT_ROW)};  // by Method
#undef KT_ROW

constexpr int kUnit = 256;  // of a normalised weight
constexpr int kTop = 127 * kUnit;

// 127 times a scale is a finite float: the largest bf16 of which that holds. The largest float is
// 127.01 of it.
constexpr float kLargestScale = 0x1.02p121f;
static_assert(kLargestScale * 127.0f < 0x1.fffffep127f);

// Mean squared distance to the table's nearest level within a bin, from a few points of it.
double bin_error(const int8_t (&levels)[kTableLevels], double low, double width) {
  constexpr int kPoints = 4;
  double sum = 0.0;
  for (int i = 0; i < kPoints; ++i) {
    const double x = low + width * (i + 0.5) / kPoints;
    double least = std::fabs(x - levels[0]);
    for (int8_t level : levels) least = std::min(least, std::fabs(x - level));
    sum += least * least;
  }
  return sum / kPoints;
}

void fill_class_errors(const Int4Tables& tables, const Candidates& candidates, int block_class,
                       TableSearch& search) {
  constexpr int kBins = TableSearch::kBins;
  constexpr int kHalf = kBins / 2;
  const double factor = kHalf * 65536.0 / (candidates.reaches[block_class] * kUnit);
  search.bin_factor[block_class] = static_cast<int16_t>(std::min<double>(factor, INT16_MAX));
  const double width = 65536.0 / search.bin_factor[block_class] / kUnit;
  for (int bin = 0; bin < kBins; ++bin) {
    for (int c = 0; c < TableSearch::kCandidates; ++c) {
      const double error =
          bin_error(tables[search.candidates[block_class][c]], (bin - kHalf) * width, width);
      search.errors[block_class][bin][c] = static_cast<uint8_t>(
          std::min<double>(UINT8_MAX, std::nearbyint(error / candidates.units[block_class])));
    }
  }
}

std::unique_ptr<TableSearch> make_search(const Learned& blocks) {
  const auto& [tables, candidates] = blocks;
  auto search = std::make_unique<TableSearch>();
  std::memcpy(search->spread_edges, candidates.spread_edges, sizeof search->spread_edges);
  std::memcpy(search->crest_edges, candidates.crest_edges, sizeof search->crest_edges);
  std::memcpy(search->candidates, candidates.lists, sizeof search->candidates);
  std::memcpy(search->levels, tables, sizeof search->levels);
  for (int t = 0; t < kNumTables; ++t)
    for (int l = 0; l + 1 < kTableLevels; ++l)
      search->thresholds[t][l] =
          static_cast<int16_t>((tables[t][l] + tables[t][l + 1]) * (kUnit / 2));
  for (int block_class = 0; block_class < TableSearch::kClasses; ++block_class)
    fill_class_errors(tables, candidates, block_class, *search);
  return search;
}

const TableSearch& table_search(Method method) {
  static const auto searches = [] {
    std::array<std::unique_ptr<TableSearch>, kNumMethods> made;
    for (size_t m = 0; m < made.size(); ++m)
      if (kLearned[m]) made[m] = make_search(*kLearned[m]);
    return made;
  }();
  return *searches[static_cast<size_t>(method)];
}

// The factor that takes a row to +-kTop or to its int8 levels. Near the subnormals it would
// overflow float: then the row is scaled up first, which is exact.
float row_factor(double factor, float* row, int64_t k) {
  if (std::isfinite(static_cast<float>(factor))) return static_cast<float>(factor);
  for (int64_t i = 0; i < k; ++i) row[i] *= 0x1p100f;
  return static_cast<float>(factor * 0x1p-100);
}

void quantize_int4(const SourceMatrix& source, const ProjectionLayout& layout,
                   const QuantizeKernels& kernels, const PackedProjection& out) {
  const TableSearch& search = table_search(layout.method);
  const auto encode = kernels.encode[static_cast<size_t>(layout.method)];
  const int64_t k = layout.k;
  std::vector<float> row(k);
  std::vector<int16_t> rows(kBlockRows * k);
  for (int64_t first = 0; first < layout.n; first += kBlockRows) {
    float top[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      top[r] = read_source_row(source, kernels, first + r, row.data());
      const float factor =
          top[r] > 0.0f ? row_factor(kTop / static_cast<double>(top[r]), row.data(), k) : 0.0f;
      kernels.round_row(row.data(), k, factor, rows.data() + r * k);
    }
    const int64_t panel = first / kPanelRows;
    EncodeTask task{rows.data(),
                    k,
                    static_cast<int>(first % kPanelRows / kBlockRows),
                    out.codes + panel * layout.codes_per_panel(),
                    out.table_index + panel * layout.index_per_panel(),
                    {},
                    {}};
    encode(search, task);
    // Given the codes, the scale that minimises |w - scale q|^2 is <w, q> / <q, q>.
    for (int r = 0; r < kBlockRows; ++r) {
      const double fit = task.qq[r] > 0 ? static_cast<double>(task.wq[r]) /
                                              (kUnit * static_cast<double>(task.qq[r]))
                                        : 1.0;
      out.scales[first + r] =
          float_to_bf16(std::min(static_cast<float>(top[r] / 127.0 * fit), kLargestScale));
    }
  }
}

void quantize_int8(const SourceMatrix& source, const ProjectionLayout& layout,
                   const QuantizeKernels& kernels, const PackedProjection& out) {
  const int64_t k = layout.k;
  std::vector<float> row(k);
  std::vector<int16_t> panel(kPanelRows * k);
  for (int64_t n = 0; n < layout.n; ++n) {
    const float top = read_source_row(source, kernels, n, row.data());
    // Rounded up, so that the largest weight stays within 127 of the scale that is stored.
    out.scales[n] = std::min(float_to_bf16_up(top / 127.0f), float_to_bf16(kLargestScale));
    const float scale = bf16_to_float(out.scales[n]);
    const float factor = scale > 0.0f ? row_factor(1.0 / scale, row.data(), k) : 0.0f;
    kernels.round_row(row.data(), k, factor, panel.data() + n % kPanelRows * k);
    if (n % kPanelRows == kPanelRows - 1)
      kernels.interleave(panel.data(), k, out.codes + n / kPanelRows * layout.codes_per_panel());
  }
}

}  // namespace

const int8_t (&int4_tables(Method method))
    [kNumTables][kTableLevels] { return kLearned[static_cast<size_t>(method)]->tables; }

void quantize_projection(const SourceMatrix& source, Method method, const QuantizeKernels& kernels,
                         const PackedProjection& out) {
  const ProjectionLayout layout{source.n, source.k, method};
  if (has_tables(method)) {
    quantize_int4(source, layout, kernels, out);
  } else {
    quantize_int8(source, layout, kernels, out);
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
      if (has_tables(layout.method)) {
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
