// panels-inl.h on matrix tiles: two panels by up to 32 tokens at a time.
//
// Int4 panels are unpacked KC at a time, in a worker's memory: the next KC between the products of
// those before, so that a CPU may do both at once. What the next panels need is prefetched on the
// way, evenly, never in bursts that tile loads would queue behind.
// docs/performance.md has what this gains on the machine it was measured on.
#pragma once

#include <cstdint>

#include "isa/amx.h"

#include "gemm/panels-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// KC, the k of int4 panels that are unpacked at once, and MC, the tokens that share them.
constexpr int64_t kTileKc = 1024;
constexpr int64_t kTileMc = 256;

struct TileWorkspace {
  alignas(64) uint8_t weights[2][2][kTileKc * kTileRows];  // [these and the next KC][panel]
  TileSums sums[kTileMc / kTileRows];
};

// Unpacks up to KC of two int4 panels, in units of 16 k of one panel.
template <int BlockK>
class Unpacker {
 public:
  Unpacker(const Panels<2>& panels, uint8_t (&out)[2][kTileKc * kTileRows], int64_t begin,
           int64_t end)
      : panels_(panels), out_(out), block_(begin / 16), blocks_((end - begin) / 16) {}

  int64_t units() const { return 2 * blocks_; }

  // Unpacks up to `count` of the units that are left.
  void run(int64_t count) {
    const int64_t end = done_ + count < units() ? done_ + count : units();
    for (; done_ < end; ++done_) {
      const int64_t p = done_ & 1, b = done_ >> 1;
      const uint8_t* codes = panels_.codes[p] + 128 * (block_ + b);
      uint8_t* out = out_[p] + 256 * b;
      const uint8_t* index = panels_.index[p] + 4 * (16 / BlockK) * (block_ + b);
      Tables tables = load_tables(panels_.tables, index);
      for (int half = 0; half < 2; ++half) {
        if (half > 0 && BlockK == 8) tables = load_tables(panels_.tables, index + 4);
        Weights low, high;
        unpack(codes + 64 * half, tables, low, high);
        store_weights(out + 128 * half, low);
        store_weights(out + 128 * half + 64, high);
      }
    }
  }

 private:
  const Panels<2>& panels_;
  uint8_t (&out_)[2][kTileKc * kTileRows];
  const int64_t block_, blocks_;
  int64_t done_ = 0;
};

// Up to 32 tokens over up to KC.
template <int Blocks, int BlockK>
inline void multiply_tile_block(const uint8_t* const (&w)[2], const uint8_t* x, int64_t stride,
                                int64_t k, bool first, Unpacker<BlockK>& unpacker, int64_t units,
                                Prefetcher& prefetcher, TileSums* sums) {
  if (first) {
    zero_sums<Blocks>();
  } else {
    load_sums<Blocks>(sums);
  }
  for (int64_t begin = 0; begin < k; begin += kTileK) {
    prefetcher.run<prefetch_second_level>();
    if constexpr (BlockK > 0) unpacker.run(units);
    multiply_tiles<Blocks, (BlockK > 0)>(w[0] + begin * kTileRows, w[1] + begin * kTileRows,
                                         x + begin, stride);
  }
  store_sums<Blocks>(sums);
}

// Calls finish(i, sums) for every i in [0, count) as multiply_panels does. Tiles must be
// configured.
template <int BlockK, class Finish>
void multiply_tile_panels(const Panels<2>& panels, const Rows& x, int64_t count, uint8_t* workspace,
                          const Finish& finish) {
  constexpr bool kHasTables = BlockK > 0;
  auto& w = *reinterpret_cast<TileWorkspace*>(workspace);
  // Int8 panels are tiles as they stand.
  const int64_t kc = kHasTables && kTileKc < panels.k ? kTileKc : panels.k;
  for (int64_t token = 0; token < count; token += kTileMc) {
    const int64_t tokens = count - token < kTileMc ? count - token : kTileMc;
    const int64_t blocks = divide_up(tokens, 2 * kTileRows);
    const bool last = token + tokens == count;
    const int64_t bytes = last ? code_bytes<BlockK>(panels.k) : 0;
    Prefetcher prefetcher(panels.next, bytes, blocks * (panels.k / kTileK));
    if constexpr (kHasTables) Unpacker<BlockK>(panels, w.weights[0], 0, kc).run(2 * kc);
    for (int64_t begin = 0, turn = 0; begin < panels.k; begin += kc, ++turn) {
      const int64_t end = begin + kc < panels.k ? begin + kc : panels.k;
      const int64_t next_end = end + kc < panels.k ? end + kc : panels.k;
      // Nothing to unpack beside the last KC.
      Unpacker<BlockK> unpacker(panels, w.weights[(turn + 1) & 1], end, next_end);
      const int64_t units = divide_up(unpacker.units(), blocks * ((end - begin) / kTileK));
      const uint8_t* tiles[2];
      for (int p = 0; p < 2; ++p)
        tiles[p] = kHasTables ? w.weights[turn & 1][p] : panels.codes[p] + begin * kTileRows;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * 2 * kTileRows;
        const uint8_t* rows = x.data + (token + first) * x.stride + begin;
        TileSums* sums = w.sums + 2 * block;
        if (tokens - first > kTileRows) {
          multiply_tile_block<2, BlockK>(tiles, rows, x.stride, end - begin, begin == 0, unpacker,
                                         units, prefetcher, sums);
        } else {
          multiply_tile_block<1, BlockK>(tiles, rows, x.stride, end - begin, begin == 0, unpacker,
                                         units, prefetcher, sums);
        }
        if (end < panels.k) continue;
        for (int64_t i = first; i < first + 2 * kTileRows && i < tokens; ++i) {
          const TileSums& s = w.sums[i / kTileRows];
          finish(token + i, {load_acc(s.v[0][i % kTileRows]), load_acc(s.v[1][i % kTileRows])});
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
