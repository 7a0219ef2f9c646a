// Activation quantisation: one int8 scale for each row. Included once by each target, after its ISA
// header.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

inline Floats load_row(const float* p) { return load_floats(p); }
inline Floats load_row(const uint16_t* p) { return load_bf16(p); }

// q = round(x * 127 / max|x|), x ~ scale * q. A row with an infinity or NaN gets a NaN scale, so
// that the damage shows in the output instead of turning into plausible numbers.
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

  const Floats inverse = set1(top > 0.0f ? 127.0f / top : 0.0f);
  Ints sum = zero_ints();
  for (int64_t i = 0; i < k; i += 16) {
    const Ints n = round_to_ints(mul(load_row(x + i), inverse));
    sum = add_ints(sum, n);
    store_int8(q + i, n);
  }
  scale->scale = top / 127.0f + total_poison;
  scale->sum = reduce_add(sum);
}

void store_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) store_bf16x16(out + i, load_floats(x + i));
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
