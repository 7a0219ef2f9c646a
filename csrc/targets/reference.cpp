// Tests only: the scalar target with activations left in float, products in double. What it gives
// is the packed weights' exact answer, so a difference to it is the activation quantisation's.
#define KT_TARGET_NAMESPACE reference
#include "isa/scalar.h"

#include "gemm/quantize_activations-inl.h"
#include "targets/kernels.h"
#include "weights/quantize_weights-inl.h"

namespace kt::reference {
namespace {

template <class T>
void keep_float(const T* x, int64_t k, uint8_t* q, RowScale* scale) {
  for (int64_t i = 0; i < k; i += 16)
    store_floats(reinterpret_cast<float*>(q) + i, load_row(x + i));
  *scale = {1.0f, 0, 0};
}

// y[r] = scales[r] * sum over k of w[r][k] x[k] for the 16 rows of a panel.
template <int BlockK>
void panel_times_row(const Matrix& m, const uint8_t* tables, int64_t panel, const uint8_t* row,
                     float* y) {
  const uint8_t* codes = m.codes + panel * m.codes_per_panel;
  const float* x = reinterpret_cast<const float*>(row);
  double sum[16] = {};
  constexpr bool kHasTables = BlockK > 0;
  for (int64_t k = 0; k < m.k; k += kHasTables ? 8 : 4) {
    Weights step[2];
    if constexpr (kHasTables) {
      const uint8_t* index = m.table_index + panel * m.index_per_panel + k / BlockK * 4;
      unpack(codes + k / 8 * 64, load_tables(tables, index), step[0], step[1]);
    } else {
      step[0] = load_weights(codes + k / 4 * 64);
    }
    for (int s = 0; s < (kHasTables ? 2 : 1); ++s)
      for (int r = 0; r < 16; ++r)
        for (int j = 0; j < 4; ++j)
          sum[r] += static_cast<double>(step[s].v[4 * r + j]) * x[k + 4 * s + j];
  }
  float scales[16];
  store_floats(scales, load_bf16(m.scales + 16 * panel));
  for (int r = 0; r < 16; ++r) y[r] = static_cast<float>(sum[r] * scales[r]);
}

template <int BlockK>
void gate_up(const GateUpTask& s) {
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel) {
    for (int64_t i = 0; i < s.count; ++i) {
      const uint8_t* x = s.x.data + i * s.x.stride;
      float g[16], u[16];
      panel_times_row<BlockK>(s.gate, s.tables, panel, x, g);
      panel_times_row<BlockK>(s.up, s.tables, panel, x, u);
      float* h = s.h + i * s.h_stride + 16 * panel;
      for (int r = 0; r < 16; ++r)
        h[r] = static_cast<float>(g[r] / (1.0 + std::exp(-static_cast<double>(g[r]))) * u[r]);
    }
  }
}

template <int BlockK>
void down(const DownTask& s) {
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel) {
    for (int64_t i = 0; i < s.count; ++i) {
      float y[16];
      panel_times_row<BlockK>(s.down, s.tables, panel, s.h.data + i * s.h.stride, y);
      float* out = s.out + s.tokens[i] * s.out_stride + 16 * panel;
      for (int r = 0; r < 16; ++r) out[r] += s.weights[i] * y[r];
    }
  }
}

}  // namespace

#define KT_ROW(method, name, bits, block_k) {gate_up<block_k>, down<block_k>},
extern const Kernels kernels;
const Kernels kernels = {
    .name = "reference",
    .activation_bytes = 4,
    .workspace_bytes = 0,
    .prepare_tables = prepare_tables,
    .quantize_f32 = keep_float<float>,
    .quantize_bf16 = keep_float<uint16_t>,
    .expert = {KT_METHODS(KT_ROW)},
    .store_bf16 = store_bf16,
    .quantize = kQuantizeKernels,
};
#undef KT_ROW

}  // namespace kt::reference
