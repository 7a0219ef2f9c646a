// AMX tiles on top of avx512.h: 16 x 64-byte tiles, products of 16 rows with 16 columns over 64 k.
//
// A panel's 16 k-steps of 64 bytes are a B tile as they stand: row s holds 16 columns x 4 k. Int4
// weights are unpacked to w + 128 as for VPDPBUSD (tables are the same), so they are the unsigned
// operand; int8 weights are used as stored.
#pragma once

#include "isa/avx512.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileK = 64;
constexpr int64_t kTileBytes = kTileRows * kTileK;

// Tiles 0-3: accumulators [row block][panel]; 4, 5: activations; 6, 7: weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}
// Back to the initial state, so that a sleeping thread has no tiles for the kernel to save.
inline void release_tiles() { _tile_release(); }

// Sums of 16 rows by 2 panels, as tiles are stored.
struct alignas(64) TileSums {
  int32_t v[2][kTileRows][16];
};

// What follows works on Blocks x 16 rows by 2 panels.
template <int Blocks>
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Blocks == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <int Blocks>
inline void load_sums(const TileSums* sums) {
  _tile_loadd(0, sums[0].v[0], 64);
  _tile_loadd(1, sums[0].v[1], 64);
  if constexpr (Blocks == 2) {
    _tile_loadd(2, sums[1].v[0], 64);
    _tile_loadd(3, sums[1].v[1], 64);
  }
}
template <int Blocks>
inline void store_sums(TileSums* sums) {
  _tile_stored(0, sums[0].v[0], 64);
  _tile_stored(1, sums[0].v[1], 64);
  if constexpr (Blocks == 2) {
    _tile_stored(2, sums[1].v[0], 64);
    _tile_stored(3, sums[1].v[1], 64);
  }
}

// sums += x . w over 64 k: one tile of each panel, and of each 16 rows of x.
template <int Blocks, bool UnsignedWeights>
inline void multiply_tiles(const uint8_t* panel0, const uint8_t* panel1, const uint8_t* x,
                           int64_t stride) {
  _tile_loadd(6, panel0, 64);
  _tile_loadd(7, panel1, 64);
  _tile_loadd(4, x, stride);
  if constexpr (Blocks == 2) _tile_loadd(5, x + kTileRows * stride, stride);
  if constexpr (UnsignedWeights) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if constexpr (Blocks == 2) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (Blocks == 2) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

// Into the second-level cache: tiles are loaded from there without a loss.
inline void prefetch_second_level(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
