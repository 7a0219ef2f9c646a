// expert-inl.h on matrix tiles, for experts with enough tokens to fill them.
#pragma once

#include "gemm/tiles-inl.h"

#include "expert/expert-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Below this many tokens of an expert the vector kernels are faster, measured on Emerald Rapids.
constexpr int64_t kMinTileTokens = 9;

template <int BlockK>
void gate_up_tiles(const GateUpTask& s) {
  if (s.count < kMinTileTokens) return gate_up<BlockK>(s);
  configure_tiles();
  for (int64_t panel = s.panel; panel < s.panel + s.panels; ++panel) {
    const Panels<2> panels = gate_up_panels(s, panel);
    multiply_tile_panels<BlockK>(panels, s.x, s.count, s.workspace,
                                 GateUpEpilogue<BlockK, (BlockK > 0)>(s, panels, panel));
  }
  release_tiles();
}

// Panels come in pairs: hidden sizes are multiples of 64.
template <int BlockK>
void down_tiles(const DownTask& s) {
  if (s.count < kMinTileTokens) return down<BlockK>(s);
  configure_tiles();
  for (int64_t panel = s.panel; panel < s.panel + s.panels; panel += 2) {
    const Panels<2> panels = down_panels(s, panel);
    multiply_tile_panels<BlockK>(panels, s.h, s.count, s.workspace,
                                 DownEpilogue<BlockK, (BlockK > 0)>(s, panels, panel));
  }
  release_tiles();
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
