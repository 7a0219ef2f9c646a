// The vocabulary of scalar.h on AVX2: two 256-bit halves for each 512-bit word.
//
// VPMADDUBSW saturates at 16 bits, so its unsigned operand is |w| <= 127 and its signed one
// x with w's sign: two products reach at most 2 * 127 * 127 = 32258 and the sum stays exact.
#pragma once
#define KT_ISA

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// 4 tokens x 2 halves = 8 accumulators of 16 registers.
constexpr int kPanelBlock = 1;
constexpr int kTokenBlock = 4;

// Up to so many tokens it is faster to unpack again for each block: measured on Zen 3. Int8 panels
// need no unpacking and are read from the cache again.
template <bool Int4>
constexpr int64_t kDirectTokens = Int4 ? 8 : INT64_MAX;

struct Pair {
  __m256i low, high;
};
using Weights = Pair;
using Tables = Pair;
using Acc = Pair;
using Ints = Pair;
struct Floats {
  __m256 low, high;
};
using Activation = __m256i;

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }

inline void prepare_tables(const int8_t* tables, uint8_t* prepared) {
  std::memcpy(prepared, tables, 256 * 16);
}

inline Tables load_tables(const uint8_t* tables, const uint8_t* index) {
  const auto table = [&](int lane) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(tables + 16 * index[lane]));
  };
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(table(0)), table(1), 1),
          _mm256_inserti128_si256(_mm256_castsi128_si256(table(2)), table(3), 1)};
}

inline void unpack(const uint8_t* codes, const Tables& tables, Weights& low, Weights& high) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i c0 = load256(codes);
  const __m256i c1 = load256(codes + 32);
  low = {_mm256_shuffle_epi8(tables.low, _mm256_and_si256(c0, nibble)),
         _mm256_shuffle_epi8(tables.high, _mm256_and_si256(c1, nibble))};
  high = {_mm256_shuffle_epi8(tables.low, _mm256_and_si256(_mm256_srli_epi16(c0, 4), nibble)),
          _mm256_shuffle_epi8(tables.high, _mm256_and_si256(_mm256_srli_epi16(c1, 4), nibble))};
}

inline Weights load_weights(const uint8_t* codes) { return {load256(codes), load256(codes + 32)}; }

inline void store_weights(uint8_t* p, const Weights& w) {
  store256(p, w.low);
  store256(p + 32, w.high);
}
inline Weights reload_weights(const uint8_t* p) { return load_weights(p); }

inline Acc zero_acc() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Acc load_acc(const int32_t* p) { return {load256(p), load256(p + 8)}; }
inline void store_acc(int32_t* p, const Acc& a) {
  store256(p, a.low);
  store256(p + 8, a.high);
}
inline Activation load_activation(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  // Without this compilers add up the products of several steps first, for which there are no
  // registers.
  asm("" : "+x"(acc));
  return acc;
}
inline void dot(Acc& acc, const Weights& w, Activation x) {
  acc.low = dot_half(acc.low, w.low, x);
  acc.high = dot_half(acc.high, w.high, x);
}

inline Floats acc_to_floats(const Acc& acc, int32_t /*x_sum*/) {
  return {_mm256_cvtepi32_ps(acc.low), _mm256_cvtepi32_ps(acc.high)};
}

inline Floats set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 load_bf16_half(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Floats load_bf16(const uint16_t* p) { return {load_bf16_half(p), load_bf16_half(p + 8)}; }
inline Floats add(const Floats& a, const Floats& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats sub(const Floats& a, const Floats& b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats mul(const Floats& a, const Floats& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats div(const Floats& a, const Floats& b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Floats max(const Floats& a, const Floats& b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats min(const Floats& a, const Floats& b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats abs(const Floats& a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline void store_floats(float* p, const Floats& a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
inline Ints round_to_ints(const Floats& a) {
  return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)};
}
inline Floats ints_to_floats(const Ints& a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
inline __m256 exp2_half(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Floats exp2_int(const Ints& n) { return {exp2_half(n.low), exp2_half(n.high)}; }
inline Ints zero_ints() { return zero_acc(); }
inline Ints add_ints(const Ints& a, const Ints& b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline void store_int8(uint8_t* p, const Ints& a) {
  // Packs work within 128-bit lanes; the permute puts the 16-bit words back in order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline float reduce_max(const Floats& a) {
  alignas(32) float v[8];
  _mm256_store_ps(v, _mm256_max_ps(a.low, a.high));
  float m = v[0];
  for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
inline int32_t reduce_add(const Ints& a) {
  alignas(32) int32_t v[8];
  store256(v, _mm256_add_epi32(a.low, a.high));
  int32_t s = 0;
  for (int i = 0; i < 8; ++i) s += v[i];
  return s;
}
inline __m256i round_bf16_half(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store_bf16x16(uint16_t* p, const Floats& a) {
  const __m256i words = _mm256_packus_epi32(round_bf16_half(a.low), round_bf16_half(a.high));
  store256(p, _mm256_permute4x64_epi64(words, 0xd8));
}
inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
