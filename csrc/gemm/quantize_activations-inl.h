// Activation quantisation: one int8 scale for each row, and another for its outliers.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm/operands.h"
#include "isa/vocabulary-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

inline Floats load_row(const float* p) { return load_floats(p); }
inline Floats load_row(const uint16_t* p) { return load_bf16(p); }

// A row has outliers where at most kMaxOutlierSteps steps hold a value above 1/kOutlierRatio of the
// largest. Ordinary rows have many more: over a thousand of the 1792 of a Gaussian row.
constexpr float kOutlierRatio = 4.0f;

// Shorter rows have too few steps for any to stand out; of smaller ones, what is left would be tiny
// (kTinyTop).
constexpr int64_t kLeastOutlierK = 4 * 4 * kMaxOutlierSteps;
constexpr float kLeastOutlier = 1e-30f;

// Of the largest value: what is left is not told from zero below, so that integers stay small.
constexpr float kLeastRest = 1.0f / 65536.0f;

// All values of the outlier steps; zeros behind them.
struct OutlierValues {
  alignas(64) float v[4 * kMaxOutlierSteps] = {};
};

// Calls f(largest magnitude of a step) for the steps of a block of 16 values.
template <class F>
inline void for_steps(const Floats& magnitudes, const F& f) {
  float v[16];
  store_floats(v, magnitudes);
  for (int s = 0; s < 16; s += 4) {
    const float a = v[s] > v[s + 1] ? v[s] : v[s + 1];
    const float b = v[s + 2] > v[s + 3] ? v[s + 2] : v[s + 3];
    f(a > b ? a : b);
  }
}

// Few steps are above, and all other values far below the largest; `top` in an ordinary row.
template <class T>
float outlier_limit(const T* x, int64_t k, float top) {
  if (k < kLeastOutlierK || !(top > kLeastOutlier) || top * 0.0f != 0.0f) return top;
  int count = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const Floats a = abs(load_row(x + i));
    if (!(reduce_max(a) > top / kOutlierRatio)) continue;
    for_steps(a, [&](float step) { count += step > top / kOutlierRatio; });
    if (count > kMaxOutlierSteps) return top;
  }
  // The largest of the steps that there is no room for.
  float largest[kMaxOutlierSteps + 1] = {};  // descending
  float& limit = largest[kMaxOutlierSteps];
  for (int64_t i = 0; i < k; i += 16) {
    const Floats a = abs(load_row(x + i));
    if (!(reduce_max(a) > limit)) continue;
    for_steps(a, [&](float step) {
      if (!(step > limit)) return;
      int rank = kMaxOutlierSteps;
      for (; rank > 0 && largest[rank - 1] < step; --rank) largest[rank] = largest[rank - 1];
      largest[rank] = step;
    });
  }
  return limit;
}

// Fills in the second term of a row; returns how many steps it has. `rest` becomes the largest
// magnitude that is left for the first, `left` what is left of the values of those steps.
template <class T>
int take_outliers(const T* x, int64_t k, float limit, float top, Outliers* outliers,
                  OutlierValues* values, OutlierValues* left, float* rest) {
  int steps = 0;
  OutlierValues large;
  Floats largest = set1(0.0f);
  for (int64_t i = 0; i < k; i += 16) {
    const Floats v = load_row(x + i);
    if (!(reduce_max(abs(v)) > limit)) {
      largest = max(abs(v), largest);
      continue;
    }
    float block[16], small[16];
    store_floats(block, v);
    for (int s = 0; s < 16; s += 4) {
      bool any = false;
      for (int j = s; j < s + 4; ++j) {
        const bool above = block[j] > limit || block[j] < -limit;
        any = any || above;
        small[j] = above ? 0.0f : block[j];
      }
      if (!any) continue;
      outliers->step[steps] = static_cast<uint16_t>((i + s) / 4);
      for (int j = 0; j < 4; ++j) {
        values->v[4 * steps + j] = block[s + j];
        large.v[4 * steps + j] = block[s + j] - small[s + j];
      }
      ++steps;
    }
    largest = max(abs(load_floats(small)), largest);
  }
  outliers->scale = top / 127.0f;
  Ints sum = zero_ints();
  for (int i = 0; i < 4 * kMaxOutlierSteps; i += 16) {
    const Ints n = round_to_ints(mul(load_floats(large.v + i), set1(127.0f / top)));
    sum = add_ints(sum, n);
    store_int8(reinterpret_cast<uint8_t*>(outliers->q) + i, n);
    const Floats error =
        sub(load_floats(values->v + i), mul(ints_to_floats(n), set1(outliers->scale)));
    store_floats(left->v + i, error);
    largest = max(abs(error), largest);
  }
  outliers->sum = reduce_add(sum);
  *rest = reduce_max(max(largest, set1(top * kLeastRest)));
  return steps;
}

// A row whose largest value is below this is tiny: 127 / top would overflow, or top / 127 be
// subnormal and lose bits. Multiplied by kLift, its values are far from both.
constexpr float kTinyTop = 0x1p-118f;
constexpr float kLift = 0x1p64f;
static_assert(kLeastOutlier * kLeastRest > kTinyTop);

// How a row is quantised: x ~ scale * q, q = round(x * inverse), in a tiny row
// round(x * kLift * inverse).
struct Step {
  float scale;
  float inverse;
  bool tiny;
};

inline Step step_of(float top) {
  if (!(top > 0.0f)) return {0.0f, 0.0f, false};
  float scale = top / 127.0f;
  if (top >= kTinyTop) return {scale, 127.0f / top, false};
  // The step is the scale as it is stored, with the few bits it has. Rounded up: never more than
  // 127 steps, and not zero.
  if (scale * 127.0f < top) scale += 0x1p-149f;
  return {scale, 1.0f / (scale * kLift), true};
}

// q of a whole row; their sum.
template <bool Tiny, class T>
Ints quantize_values(const T* x, int64_t k, float inverse, uint8_t* q) {
  Ints sum = zero_ints();
  for (int64_t i = 0; i < k; i += 16) {
    Floats v = load_row(x + i);
    if constexpr (Tiny) v = mul(v, set1(kLift));
    const Ints n = round_to_ints(mul(v, set1(inverse)));
    sum = add_ints(sum, n);
    store_int8(q + i, n);
  }
  return sum;
}

// q = round(x * 127 / max|x|), x ~ scale * q; in a row with outliers, x less their term. A row with
// an infinity or NaN gets a NaN scale, so that the damage shows in the output instead of turning
// into plausible numbers.
template <class T>
void quantize_row(const T* x, int64_t k, uint8_t* q, RowScale* scale) {
  Floats largest = set1(0.0f);
  Floats poison = set1(0.0f);  // 0 * x is NaN exactly for infinities and NaN
  for (int64_t i = 0; i < k; i += 16) {
    const Floats v = load_row(x + i);
    largest = max(abs(v), largest);
    poison = add(poison, mul(v, set1(0.0f)));
  }
  const float top = reduce_max(largest);
  float poisons[16];
  store_floats(poisons, poison);
  float total_poison = 0.0f;
  for (float p : poisons) total_poison += p;

  const float limit = outlier_limit(x, k, top);
  auto* const outliers = reinterpret_cast<Outliers*>(q + k);
  OutlierValues values, left;
  float rest = top;
  int steps = 0;
  if (limit < top) steps = take_outliers(x, k, limit, top, outliers, &values, &left, &rest);

  const Step step = step_of(rest);
  scale->sum = reduce_add(step.tiny ? quantize_values<true>(x, k, step.inverse, q)
                                    : quantize_values<false>(x, k, step.inverse, q));
  if (steps > 0) {
    // What is left of the outlier steps, in place of their values. Such a row is never tiny.
    const Floats inverse = set1(step.inverse);
    uint8_t bytes[4 * kMaxOutlierSteps];
    Ints replaced = zero_ints(), replacing = zero_ints();
    for (int i = 0; i < 4 * kMaxOutlierSteps; i += 16) {
      const Ints n = round_to_ints(mul(load_floats(left.v + i), inverse));
      replacing = add_ints(replacing, n);
      replaced = add_ints(replaced, round_to_ints(mul(load_floats(values.v + i), inverse)));
      store_int8(bytes + i, n);
    }
    for (int s = 0; s < steps; ++s) std::memcpy(q + 4 * outliers->step[s], bytes + 4 * s, 4);
    scale->sum += reduce_add(replacing) - reduce_add(replaced);
  }
  scale->scale = step.scale + total_poison;
  scale->outlier_steps = steps;
}

void store_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) store_bf16x16(out + i, load_floats(x + i));
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
