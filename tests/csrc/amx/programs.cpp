// Test programs of tile instructions, real or stood in for by the <immintrin.h> that is first on
// the include path, and the counts of tiles.h.
#include <immintrin.h>

#include "tiles.h"

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

extern "C" {

// Uses so far: loadconfig, storeconfig, release, zero, load, store, product.
void read_counts(int64_t* out) {
  for (int i = 0; i < tiles::kKinds; ++i) out[i] = tiles::counts[i].load();
}

// c += a b for an m x (4 k4) by k4 x n product in the four signednesses (0 ss, 1 su, 2 us, 3 uu),
// each row of a, b and c at its own stride.
__attribute__((target("amx-tile,amx-int8"))) void run_product(int kind, int m, int n, int k4,
                                                              const void* a, long a_stride,
                                                              const void* b, long b_stride, void* c,
                                                              long c_stride) {
  Config config;
  const int bytes[3] = {4 * n, 4 * k4, 4 * n}, rows[3] = {m, m, k4};
  for (int t = 0; t < 3; ++t) {
    config.bytes[t] = static_cast<uint16_t>(bytes[t]);
    config.rows[t] = static_cast<uint8_t>(rows[t]);
  }
  _tile_loadconfig(&config);
  _tile_loadd(0, c, c_stride);
  _tile_loadd(1, a, a_stride);
  _tile_stream_loadd(2, b, b_stride);
  if (kind == 0) _tile_dpbssd(0, 1, 2);
  if (kind == 1) _tile_dpbsud(0, 1, 2);
  if (kind == 2) _tile_dpbusd(0, 1, 2);
  if (kind == 3) _tile_dpbuud(0, 1, 2);
  _tile_stored(0, c, c_stride);
  _tile_release();
}

// The configuration after loading `config`, then after a release; the contents of a zeroed tile.
__attribute__((target("amx-tile"))) void run_config(const void* config, void* loaded,
                                                    void* released, void* zeroed) {
  _tile_loadconfig(config);
  _tile_storeconfig(loaded);
  _tile_loadd(3, zeroed, 64);
  _tile_zero(3);
  _tile_stored(3, zeroed, 64);
  _tile_release();
  _tile_storeconfig(released);
}
}
