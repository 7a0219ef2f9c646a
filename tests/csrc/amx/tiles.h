// The tile unit of AMX in memory: configuration, tiles and products as Intel's manual defines them
// (SDM volume 2, chapter 2.16 and the instruction pages), and how often each was used. A function
// returns false where the instruction would fault.
#pragma once

#include <string.h>

#include <atomic>
#include <cstdint>

namespace tiles {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Tile {
  int rows, bytes;  // as configured
  uint8_t data[kMaxRows][kMaxBytes];
};

struct State {
  bool configured;
  Tile tiles[kTiles];
};
inline constinit thread_local State state{};

enum Kind { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kStore, kProduct, kKinds };
inline std::atomic<int64_t> counts[kKinds];

inline bool count(Kind kind) {
  counts[kind].fetch_add(1, std::memory_order_relaxed);
  return true;
}

inline bool usable(int tile) { return state.configured && tile < kTiles; }

inline bool load_config(const void* from) {
  const auto* memory = static_cast<const uint8_t*>(from);
  State fresh{};
  if (memory[0] > 1) return false;
  fresh.configured = memory[0] == 1;
  for (int t = 0; fresh.configured && t < kTiles; ++t) {
    uint16_t bytes;
    memcpy(&bytes, memory + 16 + 2 * t, 2);
    fresh.tiles[t].bytes = bytes;
    fresh.tiles[t].rows = memory[48 + t];
    if (bytes > kMaxBytes || fresh.tiles[t].rows > kMaxRows) return false;
  }
  state = fresh;
  return count(kLoadConfig);
}

inline bool store_config(void* to) {
  auto* memory = static_cast<uint8_t*>(to);
  memset(memory, 0, 64);
  memory[0] = state.configured;
  for (int t = 0; t < kTiles; ++t) {
    const auto bytes = static_cast<uint16_t>(state.tiles[t].bytes);
    memcpy(memory + 16 + 2 * t, &bytes, 2);
    memory[48 + t] = static_cast<uint8_t>(state.tiles[t].rows);
  }
  return count(kStoreConfig);
}

inline bool release() {
  state = State{};
  return count(kRelease);
}

inline bool zero(int tile) {
  if (!usable(tile)) return false;
  memset(state.tiles[tile].data, 0, sizeof state.tiles[tile].data);
  return count(kZero);
}

inline bool load(int tile, const void* from, int64_t stride) {
  if (!usable(tile)) return false;
  Tile& t = state.tiles[tile];
  memset(t.data, 0, sizeof t.data);
  for (int row = 0; row < t.rows; ++row)
    memcpy(t.data[row], static_cast<const uint8_t*>(from) + stride * row, t.bytes);
  return count(kLoad);
}

inline bool store(int tile, void* to, int64_t stride) {
  if (!usable(tile)) return false;
  const Tile& t = state.tiles[tile];
  for (int row = 0; row < t.rows; ++row)
    memcpy(static_cast<uint8_t*>(to) + stride * row, t.data[row], t.bytes);
  return count(kStore);
}

// One row of a product: c[n] += sum over k of four byte products, modulo 2^32.
template <class A, class B>
void multiply_row(const Tile& a, const Tile& b, int m, int columns, uint32_t* c) {
  for (int k = 0; k < a.bytes / 4; ++k) {
    for (int n = 0; n < columns; ++n) {
      for (int j = 0; j < 4; ++j) {
        const int32_t x = static_cast<A>(a.data[m][4 * k + j]);
        const int32_t y = static_cast<B>(b.data[k][4 * n + j]);
        c[n] += static_cast<uint32_t>(x * y);
      }
    }
  }
}

// c += a b; A and B are the signednesses of the bytes, int8_t or uint8_t.
template <class A, class B>
bool multiply(int c_tile, int a_tile, int b_tile) {
  if (!usable(c_tile) || !usable(a_tile) || !usable(b_tile)) return false;
  Tile& c = state.tiles[c_tile];
  const Tile &a = state.tiles[a_tile], &b = state.tiles[b_tile];
  if (a.rows != c.rows || b.bytes != c.bytes || a.bytes / 4 != b.rows || c.bytes % 4 || a.bytes % 4)
    return false;
  for (int m = 0; m < c.rows; ++m) {
    uint32_t sums[kMaxBytes / 4];
    memcpy(sums, c.data[m], sizeof sums);
    multiply_row<A, B>(a, b, m, c.bytes / 4, sums);
    memcpy(c.data[m], sums, sizeof sums);
  }
  return count(kProduct);
}

}  // namespace tiles
