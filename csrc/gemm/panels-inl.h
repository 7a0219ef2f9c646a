// The integer product: P panels of 16 rows times the activation rows of one expert's tokens.
//
// Up to kDirectTokens tokens: weights go from memory through the table shuffle to the product in
// registers and are used at once (decode). More: a slab of k is unpacked once into the first-level
// cache and used for all tokens, their sums waiting in memory between slabs (prefill). What comes
// next is fetched in the meantime, a line now and then: bursts would hold up the loads behind them.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Ahead of the codes' stream: beyond a page's start-up miss.
constexpr int64_t kPrefetchBytes = 2048;

// k of a slab: two panels of it are 16 KiB, half of the smallest first-level cache.
constexpr int64_t kSlabK = 512;

// Tokens that share a slab: the sums of two panels for them are 16 KiB, beside the slab.
constexpr int64_t kChunkTokens = 128;

constexpr int64_t kSlabBytes = kSlabK * 16;  // of one panel

// k between two fetches; all k are multiples of it.
constexpr int64_t kFetchK = 16;

// What multiply_panels needs of a worker's memory for P panels.
template <int P>
struct PanelWorkspace {
  alignas(64) uint8_t slab[P][kSlabBytes];
  alignas(64) int32_t sums[kChunkTokens][P][16];
};

// P panels of one or several matrices, each with k columns. `next` is what is worth having in the
// cache when these are done.
template <int P>
struct Panels {
  const uint8_t* codes[P];
  const uint8_t* index[P];
  const uint8_t* next[P];
  const uint8_t* tables;
  int64_t k;
};

// What follows is compiled for BlockK = 16 and 8, the k of an int4 block, and 0 for int8.
template <int BlockK>
constexpr int64_t code_bytes(int64_t k) {
  return BlockK > 0 ? k * 8 : k * 16;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fetches `bytes` from each of P places into the cache, spread over `calls` calls of run.
template <int P>
class Fetcher {
 public:
  Fetcher(const uint8_t* const (&at)[P], int64_t bytes, int64_t calls)
      : bytes_(bytes), step_(64 * divide_up(bytes / 64, calls)) {
    for (int p = 0; p < P; ++p) at_[p] = at[p];
  }

  template <void (*Prefetch)(const uint8_t*) = prefetch>
  void run() {
    for (int64_t line = 0; line < step_ && bytes_ > 0; line += 64, bytes_ -= 64) {
      for (int p = 0; p < P; ++p) {
        Prefetch(at_[p]);
        at_[p] += 64;
      }
    }
  }

 private:
  const uint8_t* at_[P];
  int64_t bytes_;  // left, of each
  int64_t step_;   // of a call
};

// Calls step(weights of the P panels, k) for every 4 k from `begin` to `end`, unpacked from codes.
template <int P, int BlockK, class F>
inline void for_weights(const Panels<P>& panels, int64_t begin, int64_t end, const F& step) {
  if constexpr (BlockK > 0) {
    for (int64_t block = begin / BlockK; block < end / BlockK; ++block) {
      Tables tables[P];
      for (int p = 0; p < P; ++p)
        tables[p] = load_tables(panels.tables, panels.index[p] + 4 * block);
      for (int64_t k = block * BlockK; k < (block + 1) * BlockK; k += 8) {
        Weights low[P], high[P];
        for (int p = 0; p < P; ++p) {
          prefetch(panels.codes[p] + 8 * k + kPrefetchBytes);
          unpack(panels.codes[p] + 8 * k, tables[p], low[p], high[p]);
        }
        step(low, k);
        step(high, k + 4);
      }
    }
  } else {
    for (int64_t s = begin / 4; s < end / 4; ++s) {
      Weights w[P];
      for (int p = 0; p < P; ++p) {
        w[p] = load_weights(panels.codes[p] + 64 * s);
        prefetch(panels.codes[p] + 64 * s + kPrefetchBytes);
      }
      step(w, 4 * s);
    }
  }
}

// The weights of a panel at k = 4 step .. 4 step + 3.
template <int BlockK>
inline Weights weights_at(const uint8_t* codes, const uint8_t* index, const uint8_t* tables,
                          int64_t step) {
  if constexpr (BlockK > 0) {
    Weights low, high;
    unpack(codes + step / 2 * 64, load_tables(tables, index + 4 * step / BlockK * 4), low, high);
    return step % 2 == 0 ? low : high;
  } else {
    return load_weights(codes + step * 64);
  }
}

// acc[t][p] += the weights of P panels at k .. k + 3 times those of T rows.
template <int P, int T>
inline void multiply_step(const Weights (&w)[P], const uint8_t* const (&x)[T], int64_t k,
                          Acc (&acc)[T][P]) {
  for (int t = 0; t < T; ++t) {
    const Activation a = load_activation(x[t] + k);
    for (int p = 0; p < P; ++p) dot(acc[t][p], w[p], a);
  }
}

// One block of T tokens over all of k, from the codes.
template <int P, int BlockK, class Finish>
struct DirectBlocks {
  const Panels<P>& panels;
  const Rows& x;
  const Finish& finish;

  template <int T>
  void block(int64_t first) const {
    const uint8_t* rows[T];
    for (int t = 0; t < T; ++t) rows[t] = x.data + (first + t) * x.stride;
    Acc acc[T][P];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < P; ++p) acc[t][p] = zero_acc();
    for_weights<P, BlockK>(panels, 0, panels.k, [&](const Weights(&w)[P], int64_t k) {
      multiply_step<P, T>(w, rows, k, acc);
    });
    for (int t = 0; t < T; ++t) finish(first + t, acc[t]);
  }
};

// One block of T tokens over a slab.
template <int P, class Finish>
struct SlabBlocks {
  const PanelWorkspace<P>& slab;
  int32_t (*sums)[P][16];
  const Rows& x;
  const Finish& finish;
  int64_t chunk;  // first token of the chunk
  int64_t begin;  // k of the slab
  int64_t end;
  int64_t k;
  Fetcher<P>& fetcher;

  template <int T>
  void block(int64_t first) const {
    const uint8_t* rows[T];
    for (int t = 0; t < T; ++t) rows[t] = x.data + (chunk + first + t) * x.stride + begin;
    Acc acc[T][P];
    for (int t = 0; t < T; ++t)
      for (int p = 0; p < P; ++p)
        acc[t][p] = begin == 0 ? zero_acc() : load_acc(sums[first + t][p]);
    for (int64_t at = 0; at < end - begin; at += kFetchK) {
      fetcher.run();
      for (int64_t step = at; step < at + kFetchK; step += 4) {
        Weights w[P];
        for (int p = 0; p < P; ++p) w[p] = reload_weights(slab.slab[p] + 16 * step);
        multiply_step<P, T>(w, rows, step, acc);
      }
    }
    for (int t = 0; t < T; ++t) {
      if (end == k) {
        finish(chunk + first + t, acc[t]);
      } else {
        for (int p = 0; p < P; ++p) store_acc(sums[first + t][p], acc[t][p]);
      }
    }
  }
};

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

// Calls finish(i, sums) for every i in [0, count): sums[p][r] = sum over k of w_p[r][k] * x_i[k].
template <int P, int BlockK, class Finish>
void multiply_panels(const Panels<P>& panels, const Rows& x, int64_t count, uint8_t* workspace,
                     const Finish& finish) {
  if (count <= kDirectTokens<(BlockK > 0)>) {
    for_token_blocks(count, DirectBlocks<P, BlockK, Finish>{panels, x, finish});
    return;
  }
  auto& w = *reinterpret_cast<PanelWorkspace<P>*>(workspace);
  for (int64_t chunk = 0; chunk < count; chunk += kChunkTokens) {
    const int64_t tokens = count - chunk < kChunkTokens ? count - chunk : kChunkTokens;
    for (int64_t begin = 0; begin < panels.k; begin += kSlabK) {
      const int64_t end = begin + kSlabK < panels.k ? begin + kSlabK : panels.k;
      for_weights<P, BlockK>(panels, begin, end, [&](const Weights(&weights)[P], int64_t k) {
        for (int p = 0; p < P; ++p) store_weights(w.slab[p] + (k - begin) * 16, weights[p]);
      });
      const bool last_chunk = chunk + tokens == count;
      const uint8_t* next[P];
      for (int p = 0; p < P; ++p)
        next[p] = end == panels.k && last_chunk
                      ? panels.next[p]
                      : panels.codes[p] + code_bytes<BlockK>(end == panels.k ? 0 : end);
      const int64_t calls = divide_up(tokens, kTokenBlock) * ((end - begin) / kFetchK);
      Fetcher<P> fetcher(next, code_bytes<BlockK>(kSlabK), calls);
      for_token_blocks(tokens, SlabBlocks<P, Finish>{w, w.sums, x, finish, chunk, begin, end,
                                                     panels.k, fetcher});
    }
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
