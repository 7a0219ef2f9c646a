// expert-inl.h on matrix tiles, for experts with enough tokens to fill them.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Below this many tokens of an expert the vector kernels are faster, measured on Emerald Rapids.
constexpr int64_t kMinTileTokens = 13;

template <int BlockK>
void gate_up_tiles(const GateUpTask& s) {
  if (s.count < kMinTileTokens) return gate_up<BlockK>(s);
  configure_tiles();
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel)
    multiply_tile_panels<BlockK>(gate_up_panels(s, panel), s.x, s.count, s.workspace,
                                 GateUpEpilogue<(BlockK > 0)>(s, panel));
  release_tiles();
}

// Panels come in pairs: hidden sizes are multiples of 64.
template <int BlockK>
void down_tiles(const DownTask& s) {
  if (s.count < kMinTileTokens) return down<BlockK>(s);
  configure_tiles();
  for (int64_t panel = s.panel; panel < s.panel + s.panels; panel += 2)
    multiply_tile_panels<BlockK>(down_panels<2>(s, panel), s.h, s.count, s.workspace,
                                 DownEpilogue<(BlockK > 0), 2>(s, panel));
  release_tiles();
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
