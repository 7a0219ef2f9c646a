// Stands in for the compiler's header of this name: AVX-512 by SIMDe, what SIMDe 0.7.4 lacks of it,
// and AMX on tiles in memory. Each has the results of the instruction, to the bit.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

#include "amx/tiles.h"

namespace portable {

inline __m512 cvtepi32_ps(__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>(from.i32[i]);
  return simde__m512_from_private(to);
}
// To nearest even; out of range and NaN become INT32_MIN.
inline __m512i cvtps_epi32(__m512 a) {
  const simde__m512_private from = simde__m512_to_private(a);
  simde__m512i_private to;
  for (int half = 0; half < 2; ++half) to.m256i[half] = _mm256_cvtps_epi32(from.m256[half]);
  return simde__m512i_from_private(to);
}
inline __m512i cvtepu16_epi32(__m256i a) {
  const simde__m256i_private from = simde__m256i_to_private(a);
  simde__m512i_private to;
  for (int i = 0; i < 16; ++i) to.i32[i] = from.u16[i];
  return simde__m512i_from_private(to);
}
// Truncates.
inline __m256i cvtepi32_epi16(__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m256i_private to;
  for (int i = 0; i < 16; ++i) to.i16[i] = static_cast<int16_t>(from.i32[i]);
  return simde__m256i_from_private(to);
}
inline int32_t reduce_add_epi32(__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += from.u32[i];
  return static_cast<int32_t>(sum);
}
inline float reduce_max_ps(__m512 a) {
  const simde__m512_private from = simde__m512_to_private(a);
  float largest = from.f32[0];
  for (int i = 1; i < 16; ++i) largest = from.f32[i] > largest ? from.f32[i] : largest;
  return largest;
}

// Where the instruction would fault.
inline void require(bool legal) {
  if (!legal) __builtin_trap();
}

}  // namespace portable

// Later versions of SIMDe may have some of them.
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_ps
#define _mm512_cvtepi32_ps(a) portable::cvtepi32_ps(a)
#define _mm512_cvtps_epi32(a) portable::cvtps_epi32(a)
#define _mm512_cvtepu16_epi32(a) portable::cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) portable::cvtepi32_epi16(a)
#define _mm512_reduce_add_epi32(a) portable::reduce_add_epi32(a)
#define _mm512_reduce_max_ps(a) portable::reduce_max_ps(a)

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(from) portable::require(tiles::load_config(from))
#define _tile_storeconfig(to) portable::require(tiles::store_config(to))
#define _tile_release() portable::require(tiles::release())
#define _tile_zero(tile) portable::require(tiles::zero(tile))
#define _tile_loadd(tile, from, stride) portable::require(tiles::load(tile, from, stride))
#define _tile_stream_loadd _tile_loadd
#define _tile_stored(tile, to, stride) portable::require(tiles::store(tile, to, stride))
#define _tile_dpbssd(c, a, b) portable::require(tiles::multiply<int8_t, int8_t>(c, a, b))
#define _tile_dpbsud(c, a, b) portable::require(tiles::multiply<int8_t, uint8_t>(c, a, b))
#define _tile_dpbusd(c, a, b) portable::require(tiles::multiply<uint8_t, int8_t>(c, a, b))
#define _tile_dpbuud(c, a, b) portable::require(tiles::multiply<uint8_t, uint8_t>(c, a, b))
