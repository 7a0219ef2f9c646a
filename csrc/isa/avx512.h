// The vocabulary of scalar.h on AVX-512 F/BW/VL/DQ with VNNI.
//
// VPDPBUSD multiplies unsigned by signed bytes and only its signed operand can be broadcast from
// memory. So the weights are the unsigned ones, held as w + 128, and acc_to_floats takes
// 128 * sum(x) off again, one number for each token, which costs nothing for each weight.
#pragma once
#define KT_ISA

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// 2 panels x 8 tokens = 16 accumulators of 32 registers.
constexpr int kPanelBlock = 2;
constexpr int kTokenBlock = 8;

// Up to so many tokens it is faster to unpack again for each block: measured on Emerald Rapids.
// Int8 panels need no unpacking and are read from the cache again.
template <bool Int4>
constexpr int64_t kDirectTokens = Int4 ? 64 : INT64_MAX;

using Weights = __m512i;
using Tables = __m512i;
using Acc = __m512i;
using Floats = __m512;
using Ints = __m512i;
using Activation = __m512i;

inline void prepare_tables(const int8_t* tables, uint8_t* prepared) {
  for (int i = 0; i < 256 * 16; ++i) prepared[i] = static_cast<uint8_t>(tables[i] + 128);
}

inline Tables load_tables(const uint8_t* tables, const uint8_t* index) {
  const auto table = [&](int lane) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(tables + 16 * index[lane]));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(table(0)), table(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(table(2)), table(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline void unpack(const uint8_t* codes, const Tables& tables, Weights& low, Weights& high) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i c = _mm512_loadu_si512(codes);
  low = _mm512_shuffle_epi8(tables, _mm512_and_si512(c, nibble));
  high = _mm512_shuffle_epi8(tables, _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble));
}

inline Weights load_weights(const uint8_t* codes) {
  return _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(-128));
}

inline void store_weights(uint8_t* p, Weights w) { _mm512_storeu_si512(p, w); }
inline Weights reload_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline Acc zero_acc() { return _mm512_setzero_si512(); }
inline Acc load_acc(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_acc(int32_t* p, Acc a) { _mm512_storeu_si512(p, a); }
inline Activation load_activation(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
inline void dot(Acc& acc, const Weights& w, Activation x) { acc = _mm512_dpbusd_epi32(acc, w, x); }

inline Floats acc_to_floats(const Acc& acc, int32_t x_sum) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, _mm512_set1_epi32(128 * x_sum)));
}

inline Floats set1(float a) { return _mm512_set1_ps(a); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Ints round_to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline Floats ints_to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats exp2_int(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline void store_int8(uint8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}
inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
inline int32_t reduce_add(Ints a) { return _mm512_reduce_add_epi32(a); }
inline void store_bf16x16(uint16_t* p, Floats a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
