// SiLU in float, the same operations in the same order on every ISA, so that all targets give the
// same bits. No fused multiply-add for that reason (the build turns contraction off).
#pragma once

#include "isa/vocabulary-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// e^x: 2^n * p(r) with x = n ln2 + r, |r| <= ln2 / 2; Taylor to the sixth power, relative error
// below 2e-7. The argument is clamped to where 2^n is a normal float or, from 88.4 on, infinity.
inline Floats exp_floats(Floats x) {
  x = max(min(x, set1(89.0f)), set1(-87.0f));
  const Ints n = round_to_ints(mul(x, set1(1.44269504f)));
  const Floats nf = ints_to_floats(n);
  // ln2 in two parts: the first has few bits, so nf * first is exact.
  Floats r = sub(x, mul(nf, set1(0.693359375f)));
  r = sub(r, mul(nf, set1(-2.12194440e-4f)));
  Floats p = set1(1.0f / 720.0f);
  p = add(mul(p, r), set1(1.0f / 120.0f));
  p = add(mul(p, r), set1(1.0f / 24.0f));
  p = add(mul(p, r), set1(1.0f / 6.0f));
  p = add(mul(p, r), set1(0.5f));
  p = add(mul(p, r), set1(1.0f));
  p = add(mul(p, r), set1(1.0f));
  return mul(p, exp2_int(n));
}

// silu(g) * u = g / (1 + e^-g) * u. The clamp of exp_floats hides a NaN, so g itself carries it.
inline Floats silu_mul(const Floats& g, const Floats& u) {
  const Floats denominator = add(set1(1.0f), exp_floats(sub(set1(0.0f), g)));
  return mul(div(g, denominator), u);
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
