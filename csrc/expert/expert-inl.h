// One expert's MLP over a range of panels: gate and up with SwiGLU, then down with the routing
// weight. The sums of up to MC tokens then go through the epilogue to their place.
#pragma once

#include <cstdint>

#include "expert/swiglu-inl.h"
#include "expert/tasks.h"
#include "gemm/panels-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// sums * a * b, the smaller factor first: what is between is finite if the result is. NaN in `b`
// stays.
inline Floats scaled(Floats sums, Floats a, Floats b) {
  return mul(mul(sums, min(a, b)), max(a, b));
}

// Adds what the row's outliers give: y[p] += (outliers . w_p) * scale[p].
template <int BlockK>
inline void add_outliers(const Panels<2>& panels, const Rows& x, int64_t row,
                         const Floats (&scale)[2], Floats (&y)[2]) {
  const auto& outliers = *reinterpret_cast<const Outliers*>(x.data + row * x.stride + panels.k);
  Acc acc[2] = {zero_acc(), zero_acc()};
  for (int s = 0; s < x.scales[row].outlier_steps; ++s) {
    const Activation a = load_activation(reinterpret_cast<const uint8_t*>(outliers.q[s]));
    for (int p = 0; p < 2; ++p)
      dot(acc[p],
          weights_at<BlockK>(panels.codes[p], panels.index[p], panels.tables, outliers.step[s]), a);
  }
  const Floats factor = set1(outliers.scale);
  for (int p = 0; p < 2; ++p)
    y[p] = add(y[p], scaled(acc_to_floats(acc[p], outliers.sum), scale[p], factor));
}

// The epilogues: what becomes of token i's sums of two panels. `Offset`: whether the weights were
// the target's unsigned ones (w + 128).

template <int BlockK, bool Offset>
struct GateUpEpilogue {
  const GateUpTask& task;
  const Panels<2>& panels;
  float* h;  // of the first token
  Floats scale[2];

  GateUpEpilogue(const GateUpTask& t, const Panels<2>& p, int64_t panel)
      : task(t),
        panels(p),
        h(t.h + 16 * panel),
        scale{load_bf16(t.gate.scales + 16 * panel), load_bf16(t.up.scales + 16 * panel)} {}

  void operator()(int64_t i, const Acc (&sums)[2]) const {
    const RowScale& row = task.x.scales[i];
    const int32_t x_sum = Offset ? row.sum : 0;
    const Floats x_scale = set1(row.scale);
    Floats y[2];
    for (int p = 0; p < 2; ++p) y[p] = scaled(acc_to_floats(sums[p], x_sum), scale[p], x_scale);
    if (row.outlier_steps > 0) add_outliers<BlockK>(panels, task.x, i, scale, y);
    store_floats(h + i * task.h_stride, silu_mul(y[0], y[1]));
  }
};

template <int BlockK, bool Offset>
struct DownEpilogue {
  const DownTask& task;
  const Panels<2>& panels;
  float* out;  // of row 0
  Floats scale[2];

  DownEpilogue(const DownTask& t, const Panels<2>& p, int64_t panel)
      : task(t),
        panels(p),
        out(t.out + 16 * panel),
        scale{load_bf16(t.down.scales + 16 * panel), load_bf16(t.down.scales + 16 * panel + 16)} {}

  void operator()(int64_t i, const Acc (&sums)[2]) const {
    const RowScale& row = task.h.scales[i];
    const int32_t h_sum = Offset ? row.sum : 0;
    const Floats h_scale = set1(row.scale);
    Floats y[2];
    for (int p = 0; p < 2; ++p) y[p] = scaled(acc_to_floats(sums[p], h_sum), scale[p], h_scale);
    if (row.outlier_steps > 0) add_outliers<BlockK>(panels, task.h, i, scale, y);
    // The routing weight comes last: its product with a row's scale may be no float where the
    // expert's output is one.
    const Floats weight = set1(task.weights[i]);
    float* to = out + task.tokens[i] * task.out_stride;
    for (int p = 0; p < 2; ++p)
      store_floats(to + 16 * p, add(load_floats(to + 16 * p), mul(y[p], weight)));
  }
};

inline const uint8_t* codes_of(const Matrix& m, int64_t panel) {
  return m.codes + panel * m.codes_per_panel;
}
inline const uint8_t* index_of(const Matrix& m, int64_t panel) {
  return m.table_index + panel * m.index_per_panel;
}

// Gate and up of one panel; panels of a task follow each other in memory.
inline Panels<2> gate_up_panels(const GateUpTask& s, int64_t panel) {
  return {{codes_of(s.gate, panel), codes_of(s.up, panel)},
          {index_of(s.gate, panel), index_of(s.up, panel)},
          {codes_of(s.gate, panel + 1), codes_of(s.up, panel + 1)},
          s.tables,
          s.gate.k};
}

// Two panels of down.
inline Panels<2> down_panels(const DownTask& s, int64_t panel) {
  return {{codes_of(s.down, panel), codes_of(s.down, panel + 1)},
          {index_of(s.down, panel), index_of(s.down, panel + 1)},
          {codes_of(s.down, panel + 2), codes_of(s.down, panel + 3)},
          s.tables,
          s.down.k};
}

template <int BlockK>
void gate_up(const GateUpTask& s) {
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel) {
    const Panels<2> panels = gate_up_panels(s, panel);
    multiply_panels<BlockK>(panels, s.x, s.count, s.workspace,
                            GateUpEpilogue<BlockK, true>(s, panels, panel));
  }
}

// Panels come in pairs: hidden sizes are multiples of 64.
template <int BlockK>
void down(const DownTask& s) {
  for (int64_t panel = s.panel; panel < s.panel + s.panels; panel += 2) {
    const Panels<2> panels = down_panels(s, panel);
    multiply_panels<BlockK>(panels, s.h, s.count, s.workspace,
                            DownEpilogue<BlockK, true>(s, panels, panel));
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
