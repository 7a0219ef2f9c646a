// One expert's MLP over a range of panels: gate and up with SwiGLU, then down with the routing
// weight. Sums go straight from the registers through the epilogue to their place.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// The epilogues: what becomes of token i's sums of two panels. `Offset`: whether the weights were
// the target's unsigned ones (w + 128).

template <bool Offset>
struct GateUpEpilogue {
  const GateUpTask& task;
  int64_t panel;
  Floats gate_scale, up_scale;

  GateUpEpilogue(const GateUpTask& t, int64_t at)
      : task(t),
        panel(at),
        gate_scale(load_bf16(t.gate.scales + 16 * at)),
        up_scale(load_bf16(t.up.scales + 16 * at)) {}

  void operator()(int64_t i, const Acc (&sums)[2]) const {
    const RowScale& row = task.x.scales[i];
    const int32_t x_sum = Offset ? row.sum : 0;
    const Floats x_scale = set1(row.scale);
    const Floats g = mul(mul(acc_to_floats(sums[0], x_sum), gate_scale), x_scale);
    const Floats u = mul(mul(acc_to_floats(sums[1], x_sum), up_scale), x_scale);
    store_floats(task.h + i * task.h_stride + 16 * panel, silu_mul(g, u));
  }
};

template <bool Offset, int P>
struct DownEpilogue {
  const DownTask& task;
  int64_t panel;
  Floats scale[P];

  DownEpilogue(const DownTask& t, int64_t at) : task(t), panel(at) {
    for (int p = 0; p < P; ++p) scale[p] = load_bf16(t.down.scales + 16 * (at + p));
  }

  void operator()(int64_t i, const Acc (&sums)[P]) const {
    const RowScale& row = task.h.scales[i];
    const int32_t h_sum = Offset ? row.sum : 0;
    const Floats weight = set1(task.weights[i] * row.scale);
    float* out = task.out + task.tokens[i] * task.out_stride + 16 * panel;
    for (int p = 0; p < P; ++p) {
      const Floats y = mul(mul(acc_to_floats(sums[p], h_sum), scale[p]), weight);
      store_floats(out + 16 * p, add(load_floats(out + 16 * p), y));
    }
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

// P consecutive panels of down.
template <int P>
inline Panels<P> down_panels(const DownTask& s, int64_t panel) {
  Panels<P> panels;
  for (int p = 0; p < P; ++p) {
    panels.codes[p] = codes_of(s.down, panel + p);
    panels.index[p] = index_of(s.down, panel + p);
    panels.next[p] = codes_of(s.down, panel + P + p);
  }
  panels.tables = s.tables;
  panels.k = s.down.k;
  return panels;
}

template <int BlockK>
void gate_up(const GateUpTask& s) {
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel)
    multiply_panels<2, BlockK>(gate_up_panels(s, panel), s.x, s.count, s.workspace,
                               GateUpEpilogue<true>(s, panel));
}

template <int BlockK>
void down(const DownTask& s) {
  int64_t panel = s.panel;
  const int64_t end = s.panel + s.panels;
  for (; panel + 2 <= end; panel += 2)
    multiply_panels<2, BlockK>(down_panels<2>(s, panel), s.h, s.count, s.workspace,
                               DownEpilogue<true, 2>(s, panel));
  if (panel < end)
    multiply_panels<1, BlockK>(down_panels<1>(s, panel), s.h, s.count, s.workspace,
                               DownEpilogue<true, 1>(s, panel));
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
