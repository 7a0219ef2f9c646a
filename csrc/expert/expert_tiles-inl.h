// expert-inl.h on matrix tiles: two panels by up to 32 tokens at a time. Int4 panels are unpacked
// once into the workspace and used for all tokens of the expert.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Below this many tokens of an expert the vector kernels are faster, measured on Emerald Rapids.
constexpr int64_t kMinTileTokens = 13;

// Bytes of workspace for each k: two unpacked panels.
constexpr int64_t kWorkspacePerK = 2 * 16;

// The two panels as int8 tiles: where they are for int8, unpacked for int4.
template <bool Int4>
inline const uint8_t* tiles_of(const Matrix& m, const uint8_t* tables, int64_t panel,
                               uint8_t* workspace) {
  const uint8_t* codes = m.codes + panel * m.codes_per_panel;
  if constexpr (!Int4) return codes;
  const uint8_t* index = m.table_index + panel * m.index_per_panel;
  for (int64_t b = 0; b < m.k / 16; ++b) {
    const Tables block = load_tables(tables, index + 4 * b);
    for (int half = 0; half < 2; ++half) {
      Weights low, high;
      unpack(codes + 128 * b + 64 * half, block, low, high);
      _mm512_store_si512(workspace + 256 * b + 128 * half, low);
      _mm512_store_si512(workspace + 256 * b + 128 * half + 64, high);
    }
  }
  return workspace;
}

// Calls f(sums, first) for every 16 tokens from `first`; f drops the rows beyond `count`.
template <bool Int4, class F>
inline void for_tile_blocks(const uint8_t* const (&panels)[2], const Rows& x, int64_t count,
                            int64_t k, const uint8_t* const (&ahead)[2], int64_t ahead_bytes,
                            const F& f) {
  configure_tiles();
  for (int64_t first = 0; first < count; first += 2 * kTileRows) {
    const uint8_t* rows = x.data + first * x.stride;
    const int64_t fetch = first == 0 ? ahead_bytes : 0;
    if (count - first > kTileRows) {
      TileSums<2> sums;
      multiply_tiles<2, Int4>(panels, rows, x.stride, k, ahead, fetch, sums);
      f(sums.v[0], first);
      f(sums.v[1], first + kTileRows);
    } else {
      TileSums<1> sums;
      multiply_tiles<1, Int4>(panels, rows, x.stride, k, ahead, fetch, sums);
      f(sums.v[0], first);
    }
  }
  release_tiles();
}

// Row r of a stored accumulator as floats. Int8 weights carry no offset.
template <bool Int4>
inline Floats tile_row(const int32_t* row, int32_t x_sum) {
  return acc_to_floats(_mm512_load_si512(row), Int4 ? x_sum : 0);
}

template <bool Int4>
void gate_up_tiles(const GateUpTask& s) {
  if (s.count < kMinTileTokens) return gate_up<Int4>(s);
  const int64_t unpacked = s.gate.k * 16;
  const uint8_t* const panels[2] = {
      tiles_of<Int4>(s.gate, s.tables, s.panel, s.workspace),
      tiles_of<Int4>(s.up, s.tables, s.panel, s.workspace + unpacked)};
  // The same thread usually takes the next panel next.
  const uint8_t* const ahead[2] = {s.gate.codes + (s.panel + 1) * s.gate.codes_per_panel,
                                   s.up.codes + (s.panel + 1) * s.up.codes_per_panel};
  const Floats gate_scale = load_bf16(s.gate.scales + 16 * s.panel);
  const Floats up_scale = load_bf16(s.up.scales + 16 * s.panel);
  const auto finish = [&](const int32_t (*sums)[kTileRows][16], int64_t first) {
    const int64_t rows = s.count - first < kTileRows ? s.count - first : kTileRows;
    for (int64_t r = 0; r < rows; ++r) {
      const RowScale& row = s.x.scales[first + r];
      const Floats x_scale = set1(row.scale);
      const Floats g = mul(mul(tile_row<Int4>(sums[0][r], row.sum), gate_scale), x_scale);
      const Floats u = mul(mul(tile_row<Int4>(sums[1][r], row.sum), up_scale), x_scale);
      store_floats(s.h + (first + r) * s.h_stride + 16 * s.panel, silu_mul(g, u));
    }
  };
  for_tile_blocks<Int4>(panels, s.x, s.count, s.gate.k, ahead, s.gate.codes_per_panel, finish);
}

template <bool Int4>
void down_tiles(const DownTask& s) {
  if (s.count < kMinTileTokens) return down<Int4>(s);
  const int64_t unpacked = s.down.k * 16;
  const int64_t end = s.panel + s.panels;  // panels come in pairs: hidden sizes are multiples of 64
  for (int64_t panel = s.panel; panel < end; panel += 2) {
    const uint8_t* const panels[2] = {
        tiles_of<Int4>(s.down, s.tables, panel, s.workspace),
        tiles_of<Int4>(s.down, s.tables, panel + 1, s.workspace + unpacked)};
    const uint8_t* next = s.down.codes + (panel + 2) * s.down.codes_per_panel;
    const uint8_t* const ahead[2] = {next, next + s.down.codes_per_panel};
    const Floats scale[2] = {load_bf16(s.down.scales + 16 * panel),
                             load_bf16(s.down.scales + 16 * (panel + 1))};
    const auto finish = [&](const int32_t (*sums)[kTileRows][16], int64_t first) {
      const int64_t rows = s.count - first < kTileRows ? s.count - first : kTileRows;
      for (int64_t r = 0; r < rows; ++r) {
        const RowScale& row = s.h.scales[first + r];
        const Floats weight = set1(s.weights[first + r] * row.scale);
        float* out = s.out + s.tokens[first + r] * s.out_stride + 16 * panel;
        for (int p = 0; p < 2; ++p) {
          const Floats y = mul(mul(tile_row<Int4>(sums[p][r], row.sum), scale[p]), weight);
          store_floats(out + 16 * p, add(load_floats(out + 16 * p), y));
        }
      }
    };
    for_tile_blocks<Int4>(panels, s.h, s.count, s.down.k, ahead, s.down.codes_per_panel, finish);
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
