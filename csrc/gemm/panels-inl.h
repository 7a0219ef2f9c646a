// The integer product: P panels of 16 rows times T activation rows over all of k, in registers.
// Weights are unpacked once and used for T tokens; each activation is broadcast once and used for
// P panels.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

constexpr int64_t kPrefetchBytes =
    2048;  // ahead of the codes' stream: beyond a page's start-up miss

// acc[p][t][r] = sum over k of w_p[r][k] * x_t[k].
template <int P, int T, bool Int4>
inline void dot_panels(const uint8_t* const (&codes)[P], const uint8_t* const (&index)[P],
                       const uint8_t* tables, int64_t k, const uint8_t* const (&x)[T],
                       Acc (&acc)[P][T]) {
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) acc[p][t] = zero_acc();

  const auto step = [&](const Weights(&w)[P], int64_t at) {
    for (int t = 0; t < T; ++t) {
      const Activation a = load_activation(x[t] + at);
      for (int p = 0; p < P; ++p) dot(acc[p][t], w[p], a);
    }
  };

  if constexpr (Int4) {
    for (int64_t b = 0; b < k / 16; ++b) {
      Tables block[P];
      for (int p = 0; p < P; ++p) {
        block[p] = load_tables(tables, index[p] + 4 * b);
        prefetch(codes[p] + 128 * b + kPrefetchBytes);
        prefetch(codes[p] + 128 * b + 64 + kPrefetchBytes);
      }
      for (int half = 0; half < 2; ++half) {
        Weights low[P], high[P];
        for (int p = 0; p < P; ++p)
          unpack(codes[p] + 128 * b + 64 * half, block[p], low[p], high[p]);
        step(low, 16 * b + 8 * half);
        step(high, 16 * b + 8 * half + 4);
      }
    }
  } else {
    for (int64_t s = 0; s < k / 4; ++s) {
      Weights w[P];
      for (int p = 0; p < P; ++p) {
        w[p] = load_weights(codes[p] + 64 * s);
        prefetch(codes[p] + 64 * s + kPrefetchBytes);
      }
      step(w, 4 * s);
    }
  }
}

// Calls f.template block<T>(first) for all of [0, count) in blocks of at most kTokenBlock.
template <int T, class F>
inline void tail_block(int64_t first, int64_t count, const F& f) {
  if constexpr (T > 0) {
    if (count == T) {
      f.template block<T>(first);
    } else {
      tail_block<T - 1>(first, count, f);
    }
  }
}
template <class F>
inline void for_token_blocks(int64_t count, const F& f) {
  int64_t first = 0;
  for (; count - first >= kTokenBlock; first += kTokenBlock) f.template block<kTokenBlock>(first);
  tail_block<kTokenBlock - 1>(first, count - first, f);
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
