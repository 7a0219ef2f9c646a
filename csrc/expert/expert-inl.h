// One expert's MLP over a range of panels: gate and up with SwiGLU, then down with the routing
// weight. Results go straight from the registers to their place; no buffer in between.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

template <bool Int4>
struct GateUpBlocks {
  const GateUpTask& task;

  template <int T>
  void block(int64_t first) const {
    const GateUpTask& s = task;
    const uint8_t* x[T];
    for (int t = 0; t < T; ++t) x[t] = s.x.data + (first + t) * s.x.stride;
    const uint8_t* const codes[2] = {s.gate.codes + s.panel * s.gate.codes_per_panel,
                                     s.up.codes + s.panel * s.up.codes_per_panel};
    const uint8_t* const index[2] = {s.gate.table_index + s.panel * s.gate.index_per_panel,
                                     s.up.table_index + s.panel * s.up.index_per_panel};
    Acc acc[2][T];
    dot_panels<2, T, Int4>(codes, index, s.tables, s.gate.k, x, acc);

    const Floats gate_scale = load_bf16(s.gate.scales + 16 * s.panel);
    const Floats up_scale = load_bf16(s.up.scales + 16 * s.panel);
    for (int t = 0; t < T; ++t) {
      const RowScale& row = s.x.scales[first + t];
      const Floats x_scale = set1(row.scale);
      const Floats g = mul(mul(acc_to_floats(acc[0][t], row.sum), gate_scale), x_scale);
      const Floats u = mul(mul(acc_to_floats(acc[1][t], row.sum), up_scale), x_scale);
      store_floats(s.h + (first + t) * s.h_stride + 16 * s.panel, silu_mul(g, u));
    }
  }
};

template <bool Int4>
void gate_up(const GateUpTask& task) {
  for_token_blocks(task.count, GateUpBlocks<Int4>{task});
}

template <bool Int4, int P>
struct DownBlocks {
  const DownTask& task;
  int64_t panel;

  template <int T>
  void block(int64_t first) const {
    const DownTask& s = task;
    const uint8_t* x[T];
    for (int t = 0; t < T; ++t) x[t] = s.h.data + (first + t) * s.h.stride;
    const uint8_t* codes[P];
    const uint8_t* index[P];
    for (int p = 0; p < P; ++p) {
      codes[p] = s.down.codes + (panel + p) * s.down.codes_per_panel;
      index[p] = s.down.table_index + (panel + p) * s.down.index_per_panel;
    }
    Acc acc[P][T];
    dot_panels<P, T, Int4>(codes, index, s.tables, s.down.k, x, acc);

    for (int p = 0; p < P; ++p) {
      const Floats scale = load_bf16(s.down.scales + 16 * (panel + p));
      for (int t = 0; t < T; ++t) {
        const RowScale& row = s.h.scales[first + t];
        const Floats weight = set1(s.weights[first + t] * row.scale);
        const Floats y = mul(mul(acc_to_floats(acc[p][t], row.sum), scale), weight);
        float* out = s.out + s.tokens[first + t] * s.out_stride + 16 * (panel + p);
        store_floats(out, add(load_floats(out), y));
      }
    }
  }
};

template <bool Int4>
void down(const DownTask& task) {
  int64_t panel = task.panel;
  const int64_t end = task.panel + task.panels;
  for (; panel + 2 <= end; panel += 2)
    for_token_blocks(task.count, DownBlocks<Int4, 2>{task, panel});
  if (panel < end) for_token_blocks(task.count, DownBlocks<Int4, 1>{task, panel});
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
