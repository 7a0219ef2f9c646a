// The vocabulary that kernels are written in, as plain C++: the definition the other ISAs match
// bit for bit.
//
//   Weights   64 int8: 16 rows x 4 k, row-major (row r, step j at 4 r + j)
//   Tables    four 16-level tables, one for each lane of 4 rows
//   Acc       16 int32, one for each row of a panel
//   Floats    16 float
#pragma once
#define KT_ISA

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Panels and tokens of one register block.
constexpr int kPanelBlock = 2;
constexpr int kTokenBlock = 4;

// More tokens of an expert than these share unpacked weights.
template <bool Int4>
constexpr int64_t kDirectTokens = kTokenBlock;

struct Weights {
  int8_t v[64];
};
struct Tables {
  int8_t v[4][16];
};
struct Acc {
  int32_t v[16];
};
struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};
using Activation = const int8_t*;

inline void prepare_tables(const int8_t* tables, uint8_t* prepared) {
  std::memcpy(prepared, tables, 256 * 16);
}

inline Tables load_tables(const uint8_t* tables, const uint8_t* index) {
  Tables t;
  for (int lane = 0; lane < 4; ++lane) std::memcpy(t.v[lane], tables + 16 * index[lane], 16);
  return t;
}

inline void unpack(const uint8_t* codes, const Tables& tables, Weights& low, Weights& high) {
  for (int i = 0; i < 64; ++i) {
    low.v[i] = tables.v[i / 16][codes[i] & 15];
    high.v[i] = tables.v[i / 16][codes[i] >> 4];
  }
}

inline Weights load_weights(const uint8_t* codes) {
  Weights w;
  std::memcpy(w.v, codes, 64);
  return w;
}

// Unpacked weights as they are kept (gemm/panels-inl.h), 64 bytes.
inline void store_weights(uint8_t* p, const Weights& w) { std::memcpy(p, w.v, 64); }
inline Weights reload_weights(const uint8_t* p) { return load_weights(p); }

inline Acc zero_acc() { return Acc{}; }
inline Acc load_acc(const int32_t* p) {
  Acc a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void store_acc(int32_t* p, const Acc& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Activation load_activation(const uint8_t* x) { return reinterpret_cast<const int8_t*>(x); }

inline void dot(Acc& acc, const Weights& w, Activation x) {
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < 4; ++j) acc.v[r] += int32_t{w.v[4 * r + j]} * x[j];
}

inline Floats acc_to_floats(const Acc& acc, int32_t /*x_sum*/) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(acc.v[i]);
  return f;
}

#define KT_EACH(expression)                           \
  Floats f;                                           \
  for (int i = 0; i < 16; ++i) f.v[i] = (expression); \
  return f

inline Floats set1(float a) { KT_EACH(a); }
inline Floats load_floats(const float* p) { KT_EACH(p[i]); }
inline Floats load_bf16(const uint16_t* p) {
  Floats f;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = uint32_t{p[i]} << 16;
    std::memcpy(&f.v[i], &bits, 4);
  }
  return f;
}
inline Floats add(const Floats& a, const Floats& b) { KT_EACH(a.v[i] + b.v[i]); }
inline Floats sub(const Floats& a, const Floats& b) { KT_EACH(a.v[i] - b.v[i]); }
inline Floats mul(const Floats& a, const Floats& b) { KT_EACH(a.v[i] * b.v[i]); }
inline Floats div(const Floats& a, const Floats& b) { KT_EACH(a.v[i] / b.v[i]); }
inline Floats max(const Floats& a, const Floats& b) { KT_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats min(const Floats& a, const Floats& b) { KT_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats abs(const Floats& a) { KT_EACH(std::fabs(a.v[i])); }
#undef KT_EACH

inline void store_floats(float* p, const Floats& a) { std::memcpy(p, a.v, sizeof a.v); }

// Nearest integer, ties to even; out of range and NaN give INT32_MIN as CVTPS2DQ does.
inline Ints round_to_ints(const Floats& a) {
  Ints n;
  for (int i = 0; i < 16; ++i) {
    const float r = std::nearbyint(a.v[i]);
    n.v[i] = r >= -2147483648.0f && r < 2147483648.0f ? static_cast<int32_t>(r) : INT32_MIN;
  }
  return n;
}
inline Floats ints_to_floats(const Ints& n) {
  Floats f;
  for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(n.v[i]);
  return f;
}
// 2^n for n in [-126, 127]; infinity for 128.
inline Floats exp2_int(const Ints& n) {
  Floats f;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(n.v[i] + 127) << 23;
    std::memcpy(&f.v[i], &bits, 4);
  }
  return f;
}
inline Ints zero_ints() { return Ints{}; }
inline Ints add_ints(const Ints& a, const Ints& b) {
  Ints n;
  for (int i = 0; i < 16; ++i) n.v[i] = a.v[i] + b.v[i];
  return n;
}
inline void store_int8(uint8_t* p, const Ints& a) {  // saturating
  for (int i = 0; i < 16; ++i) {
    const int32_t c = a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i];
    p[i] = static_cast<uint8_t>(static_cast<int8_t>(c));
  }
}
inline float reduce_max(const Floats& a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline int32_t reduce_add(const Ints& a) {
  int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}
// Round to nearest even; NaN stays NaN.
inline void store_bf16x16(uint16_t* p, const Floats& a) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    p[i] = a.v[i] != a.v[i] ? 0x7fc0
                            : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
inline void prefetch(const uint8_t*) {}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
