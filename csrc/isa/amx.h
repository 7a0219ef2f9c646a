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

// Accumulators of Blocks x 16 rows by 2 panels, as they are stored: [block][panel][row][column].
template <int Blocks>
struct alignas(64) TileSums {
  int32_t v[Blocks][2][kTileRows][16];
};

// sums = x . w over k. `panels` are two panels of int8 weights, k / 64 tiles each; `x` holds
// Blocks x 16 rows. `ahead[p]` is fetched into the cache on the way, `ahead_bytes` of each.
template <int Blocks, bool UnsignedWeights>
inline void multiply_tiles(const uint8_t* const (&panels)[2], const uint8_t* x, int64_t stride,
                           int64_t k, const uint8_t* const (&ahead)[2], int64_t ahead_bytes,
                           TileSums<Blocks>& sums) {
  const int64_t ahead_step = ahead_bytes * kTileK / k;  // bytes for each step of the loop
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Blocks == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t at = 0, fetch = 0; at < k; at += kTileK, fetch += ahead_step) {
    for (int64_t line = 0; line < ahead_step; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead[0] + fetch + line), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead[1] + fetch + line), _MM_HINT_T1);
    }
    _tile_loadd(6, panels[0] + at * kTileRows, 64);
    _tile_loadd(7, panels[1] + at * kTileRows, 64);
    _tile_loadd(4, x + at, stride);
    if constexpr (Blocks == 2) _tile_loadd(5, x + kTileRows * stride + at, stride);
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
  _tile_stored(0, sums.v[0][0], 64);
  _tile_stored(1, sums.v[0][1], 64);
  if constexpr (Blocks == 2) {
    _tile_stored(2, sums.v[1][0], 64);
    _tile_stored(3, sums.v[1][1], 64);
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
