// The integer product: two panels of 16 rows times the activation rows of one expert's tokens.
//
// Up to kDirectTokens tokens: weights go from memory through the table shuffle to the product in
// registers and are used at once, for each block of tokens again. More: a block of KC k is unpacked
// once into the first-level cache and used for all tokens, their sums waiting in memory between
// such blocks. What comes next is prefetched in the meantime, a line now and then: bursts would
// hold up the loads behind them.
//
// The innermost loops are functions of their own, which take a block of kPanelBlock panels and
// kTokenBlock tokens and give their sums through memory. Inlined into what surrounds them,
// compilers find no registers for the sums: they copy each one at each step, and spill some.
#pragma once

#include <cstdint>

#include "gemm/operands.h"
#include "isa/vocabulary-inl.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// Panels taken at once: gate and up of the same rows, or two of down.
constexpr int kPanels = 2;
static_assert(kPanels % kPanelBlock == 0);

// Ahead of the codes' stream: beyond a page's start-up miss.
constexpr int64_t kPrefetchBytes = 2048;

// KC, the k that are unpacked at once: of two panels they take 16 KiB, half of the smallest
// first-level cache.
constexpr int64_t kKc = 512;
constexpr int64_t kKcBytes = kKc * 16;  // of one panel, unpacked

// MC, the tokens that share unpacked weights while their sums wait in memory: sums of two panels
// are 16 KiB.
constexpr int64_t kMc = 128;

// k of an iteration of the inner loops, which prefetches once; all k are multiples of it.
constexpr int64_t kUnrollK = 16;

// What multiply_panels needs of a worker's memory.
struct PanelWorkspace {
  alignas(64) uint8_t weights[kPanels][kKcBytes];  // unpacked
  alignas(64) int32_t sums[kMc][kPanels][16];
};

// P panels of one or several matrices, each with k columns. `next` is what is prefetched on the
// way.
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

// Prefetches `bytes` of each of the `panels`, spread over `calls` calls of run.
class Prefetcher {
 public:
  Prefetcher(const uint8_t* const (&panels)[kPanels], int64_t bytes, int64_t calls)
      : bytes_(bytes), step_(64 * divide_up(bytes / 64, calls)) {
    for (int p = 0; p < kPanels; ++p) next_[p] = panels[p];
  }

  template <void (*Prefetch)(const uint8_t*) = prefetch>
  void run() {
    for (int64_t line = 0; line < step_ && bytes_ > 0; line += 64, bytes_ -= 64) {
      for (int p = 0; p < kPanels; ++p) {
        Prefetch(next_[p]);
        next_[p] += 64;
      }
    }
  }

 private:
  const uint8_t* next_[kPanels];
  int64_t bytes_;  // left, of each
  int64_t step_;   // of a call
};

// The kPanelBlock panels from `first` on.
inline Panels<kPanelBlock> panel_block(const Panels<kPanels>& panels, int first) {
  Panels<kPanelBlock> block;
  for (int p = 0; p < kPanelBlock; ++p) {
    block.codes[p] = panels.codes[first + p];
    block.index[p] = panels.index[first + p];
    block.next[p] = panels.next[first + p];
  }
  block.tables = panels.tables;
  block.k = panels.k;
  return block;
}

// Calls step(weights of the P panels, k) for every 4 k from `begin` to `end`, unpacked from codes.
template <int P, int BlockK, class F>
inline void for_weights(const Panels<P>& panels, int64_t begin, int64_t end, const F& step) {
  constexpr int64_t kStep = BlockK > 0 ? BlockK : kUnrollK;
  for (int64_t block = begin; block < end; block += kStep) {
    if constexpr (BlockK > 0) {
      Tables tables[P];
      for (int p = 0; p < P; ++p)
        tables[p] = load_tables(panels.tables, panels.index[p] + block / BlockK * 4);
      for (int64_t k = 0; k < BlockK; k += 8) {
        Weights low[P], high[P];
        for (int p = 0; p < P; ++p) {
          const uint8_t* codes = panels.codes[p] + 8 * (block + k);
          prefetch(codes + kPrefetchBytes);
          unpack(codes, tables[p], low[p], high[p]);
        }
        step(low, block + k);
        step(high, block + k + 4);
      }
    } else {
      for (int64_t k = 0; k < kUnrollK; k += 4) {
        Weights w[P];
        for (int p = 0; p < P; ++p) {
          const uint8_t* codes = panels.codes[p] + 16 * (block + k);
          prefetch(codes + kPrefetchBytes);
          w[p] = load_weights(codes);
        }
        step(w, block + k);
      }
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

// T rows of activations, reached from a third as many pointers: there are not registers enough for
// one for each.
template <int T>
class RowPointers {
 public:
  RowPointers(const uint8_t* first, int64_t stride) : stride_(stride) {
    for (int i = 0; i < kPointers; ++i) at_[i] = first + 3 * i * stride;
  }
  const uint8_t* operator[](int t) const { return at_[t / 3] + t % 3 * stride_; }

 private:
  static constexpr int kPointers = (T + 2) / 3;
  const uint8_t* at_[kPointers];
  int64_t stride_;
};

// acc[t][p] += the weights of P panels at k .. k + 3 times those of T rows.
template <int P, int T>
inline void multiply_step(const Weights (&w)[P], const RowPointers<T>& rows, int64_t k,
                          Acc (&acc)[T][P]) {
  Activation x[T];
  for (int t = 0; t < T; ++t) x[t] = load_activation(rows[t] + k);
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) dot(acc[t][p], w[p], x[t]);
}

// A block's sums from and to PanelWorkspace::sums, where its first token's are at `sums`.
template <int P, int T>
inline void load_block(const int32_t* sums, Acc (&acc)[T][P]) {
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < P; ++p) acc[t][p] = load_acc(sums + 16 * (kPanels * t + p));
}
template <int P, int T>
inline void store_block(int32_t* sums, const Acc (&acc)[T][P]) {
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < P; ++p) store_acc(sums + 16 * (kPanels * t + p), acc[t][p]);
}
template <int P, int T>
inline void zero_block(Acc (&acc)[T][P]) {
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < P; ++p) acc[t][p] = zero_acc();
}

// A block over all of k, from the codes.
template <int BlockK, int T>
[[gnu::noinline]] void multiply_codes(const Panels<kPanelBlock>& panels, const uint8_t* x,
                                      int64_t stride, int32_t* sums) {
  const RowPointers<T> rows(x, stride);
  Acc acc[T][kPanelBlock];
  zero_block(acc);
  for_weights<kPanelBlock, BlockK>(
      panels, 0, panels.k,
      [&](const Weights(&w)[kPanelBlock], int64_t k) { multiply_step(w, rows, k, acc); });
  store_block(sums, acc);
}

// A block over k of unpacked weights.
template <int T>
[[gnu::noinline]] void multiply_unpacked(const uint8_t (*weights)[kKcBytes], int64_t k, bool first,
                                         const uint8_t* x, int64_t stride, Prefetcher& prefetcher,
                                         int32_t* sums) {
  const RowPointers<T> rows(x, stride);
  Acc acc[T][kPanelBlock];
  if (first) {
    zero_block(acc);
  } else {
    load_block(sums, acc);
  }
  for (int64_t begin = 0; begin < k; begin += kUnrollK) {
    prefetcher.run();
    for (int64_t step = 0; step < kUnrollK; step += 4) {
      Weights w[kPanelBlock];
      for (int p = 0; p < kPanelBlock; ++p) w[p] = reload_weights(weights[p] + 16 * (begin + step));
      multiply_step(w, rows, begin + step, acc);
    }
  }
  store_block(sums, acc);
}

// Calls block.template operator()<T>(first) for all of [0, count), T at most kTokenBlock.
template <int T, class F>
inline void tail_block(int64_t first, int64_t count, const F& block) {
  if constexpr (T > 0) {
    if (count == T) {
      block.template operator()<T>(first);
    } else {
      tail_block<T - 1>(first, count, block);
    }
  }
}
template <class F>
inline void for_token_blocks(int64_t count, const F& block) {
  int64_t first = 0;
  for (; count - first >= kTokenBlock; first += kTokenBlock)
    block.template operator()<kTokenBlock>(first);
  tail_block<kTokenBlock - 1>(first, count - first, block);
}

// The sums of the first `tokens` rows of x, at most kMc, into w.sums.
template <int BlockK>
void multiply_direct(const Panels<kPanels>& panels, const Rows& x, int64_t tokens,
                     PanelWorkspace& w) {
  for (int p = 0; p < kPanels; p += kPanelBlock) {
    const Panels<kPanelBlock> block = panel_block(panels, p);
    for_token_blocks(tokens, [&]<int T>(int64_t first) {
      multiply_codes<BlockK, T>(block, x.data + first * x.stride, x.stride, w.sums[first][p]);
    });
  }
}

// The same with weights that are unpacked KC at a time. `next` is what to prefetch during the last.
template <int BlockK>
void multiply_by_kc(const Panels<kPanels>& panels, const Rows& x, int64_t tokens,
                    const uint8_t* const (&next)[kPanels], PanelWorkspace& w) {
  for (int64_t begin = 0; begin < panels.k; begin += kKc) {
    const int64_t end = begin + kKc < panels.k ? begin + kKc : panels.k;
    for_weights<kPanels, BlockK>(panels, begin, end,
                                 [&](const Weights(&weights)[kPanels], int64_t k) {
                                   for (int p = 0; p < kPanels; ++p)
                                     store_weights(w.weights[p] + (k - begin) * 16, weights[p]);
                                 });
    const uint8_t* after[kPanels];
    for (int p = 0; p < kPanels; ++p)
      after[p] = end == panels.k ? next[p] : panels.codes[p] + code_bytes<BlockK>(end);
    const int64_t blocks = kPanels / kPanelBlock * divide_up(tokens, kTokenBlock);
    Prefetcher prefetcher(after, code_bytes<BlockK>(kKc), blocks * ((end - begin) / kUnrollK));
    for (int p = 0; p < kPanels; p += kPanelBlock) {
      for_token_blocks(tokens, [&]<int T>(int64_t first) {
        multiply_unpacked<T>(w.weights + p, end - begin, begin == 0,
                             x.data + first * x.stride + begin, x.stride, prefetcher,
                             w.sums[first][p]);
      });
    }
  }
}

// Calls finish(i, sums) for every i in [0, count): sums[p][r] = sum over k of w_p[r][k] * x_i[k].
template <int BlockK, class Finish>
void multiply_panels(const Panels<kPanels>& panels, const Rows& x, int64_t count,
                     uint8_t* workspace, const Finish& finish) {
  auto& w = *reinterpret_cast<PanelWorkspace*>(workspace);
  for (int64_t first = 0; first < count; first += kMc) {
    const int64_t tokens = count - first < kMc ? count - first : kMc;
    const Rows rows{x.data + first * x.stride, x.stride, x.scales + first};
    if (count <= kDirectTokens<(BlockK > 0)>) {
      multiply_direct<BlockK>(panels, rows, tokens, w);
    } else {
      // The next tokens begin with the same panels.
      multiply_by_kc<BlockK>(panels, rows, tokens,
                             first + tokens == count ? panels.next : panels.codes, w);
    }
    for (int64_t i = 0; i < tokens; ++i)
      finish(first + i, {load_acc(w.sums[i][0]), load_acc(w.sums[i][1])});
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
