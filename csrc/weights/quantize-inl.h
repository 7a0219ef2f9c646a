// The packer's loops. Included by each target: vector types and plain loops that the compiler turns
// into the target's instructions, so no ISA header is needed. Integers, and floats lane by lane in
// one order: every target gives the same bytes.

#include "weights/quantize_kernels.h"

namespace kt::KT_TARGET_NAMESPACE {
namespace {

#define KT_VECTOR(bytes) __attribute__((vector_size(bytes), aligned(1), may_alias))
using Words16 = uint16_t KT_VECTOR(32);
using Shorts16 = int16_t KT_VECTOR(32);
using Shorts8 = int16_t KT_VECTOR(16);
using Floats8 = float KT_VECTOR(32);
using Ints8 = int32_t KT_VECTOR(32);
using UInts8 = uint32_t KT_VECTOR(32);
using Bytes8 = uint8_t KT_VECTOR(8);
using Bytes16 = uint8_t KT_VECTOR(16);
using Levels16 = int8_t KT_VECTOR(16);
#undef KT_VECTOR

// Values are built from their bits; those below 8 are subnormal and have no hidden bit.
void decode_fp8(const uint8_t* bytes, const float* scales, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 8) {
    const auto value = __builtin_convertvector(*reinterpret_cast<const Bytes8*>(bytes + i), Ints8);
    const Ints8 magnitude = value & 0x7f;
    const Floats8 small = __builtin_convertvector(magnitude, Floats8) * 0x1p-9f;
    const Ints8 normal = (magnitude << 20) + (120 << 23);
    const Ints8 finite = magnitude < 8 ? reinterpret_cast<const Ints8&>(small) : normal;
    const Ints8 nan = (magnitude == 0x7f) & 0x7fc00000;
    const Ints8 bits = finite | nan | (value & 0x80) << 24;
    *reinterpret_cast<Floats8*>(out + i) = reinterpret_cast<const Floats8&>(bits) * scales[i / 128];
  }
}

uint32_t largest_bits(const float* row, int64_t k) {
  Ints8 largest = {};
  for (int64_t i = 0; i < k; i += 8) {
    const Ints8 bits = *reinterpret_cast<const Ints8*>(row + i) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  int32_t top = 0;
  for (int i = 0; i < 8; ++i) top = largest[i] > top ? largest[i] : top;
  return static_cast<uint32_t>(top);
}

// Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits of the sum.
void round_row(const float* row, int64_t k, float factor, int16_t* out) {
  for (int64_t i = 0; i < k; i += 8) {
    const Floats8 sum = *reinterpret_cast<const Floats8*>(row + i) * factor + 0x1.8p23f;
    *reinterpret_cast<Shorts8*>(out + i) =
        __builtin_convertvector(reinterpret_cast<const Ints8&>(sum), Shorts8);
  }
}

void interleave(const int16_t* rows, int64_t k, uint8_t* codes) {
  for (int64_t i = 0; i < k; i += 16) {
    for (int r = 0; r < kPanelRows; ++r) {
      const auto row = reinterpret_cast<const Shorts16*>(rows + r * k + i);
      const Bytes16 bytes = __builtin_convertvector(*row, Bytes16);
      for (int step = 0; step < 4; ++step)
        std::memcpy(codes + (i + 4 * step) * kPanelRows + 4 * r,
                    reinterpret_cast<const char*>(&bytes) + 4 * step, 4);
    }
  }
}

// v = mask ? w : v
template <class Mask>
inline void keep(UInts8& v, const UInts8& w, const Mask& mask) {
  v = mask ? w : v;
}

// Folds the eight lanes with `fold(v, w)`, which leaves its result in v.
template <class Fold>
inline uint32_t reduce(const UInts8& lanes, Fold fold) {
  UInts8 v = lanes;
  UInts8 w = __builtin_shuffle(v, UInts8{4, 5, 6, 7, 0, 1, 2, 3});
  fold(v, w);
  w = __builtin_shuffle(v, UInts8{2, 3, 0, 1, 6, 7, 4, 5});
  fold(v, w);
  w = __builtin_shuffle(v, UInts8{1, 0, 3, 2, 5, 4, 7, 6});
  fold(v, w);
  return v[0];
}

template <int Weights>
int block_class(const TableSearch& search, const int16_t* x) {
  alignas(32) int16_t squares[Weights];
  for (int i = 0; i < Weights; ++i) squares[i] = static_cast<int16_t>(x[i] * x[i] >> 16);
  Words16 sums = {};
  Shorts16 tops = {};
  for (int i = 0; i < Weights; i += 16) {  // at most 4 * 127^2: fits
    sums += *reinterpret_cast<const Words16*>(squares + i);
    const Shorts16 v = *reinterpret_cast<const Shorts16*>(x + i);
    const Shorts16 magnitude = v > -v ? v : -v;
    tops = magnitude > tops ? magnitude : tops;
  }
  const auto pairs = reinterpret_cast<const UInts8&>(sums);
  const auto sum = static_cast<int32_t>(
      reduce(UInts8((pairs & 0xffff) + (pairs >> 16)), [](auto& v, auto& w) { v += w; }));
  const auto top_pairs = reinterpret_cast<const UInts8&>(tops);  // not negative
  UInts8 tops32 = top_pairs & 0xffff;
  keep(tops32, UInts8(top_pairs >> 16), tops32 < top_pairs >> 16);
  const auto larger = [](auto& v, auto& w) { keep(v, w, v < w); };
  auto top = static_cast<int32_t>(reduce(tops32, larger));
  top >>= 4;
  int spread = 0;
  for (int32_t edge : search.spread_edges) spread += sum >= edge;
  const auto square = static_cast<float>(top * top);
  int crest = 0;
  for (float edge : search.crest_edges[spread])
    crest += square >= edge * static_cast<float>(sum > 1 ? sum : 1);
  return spread * TableSearch::kCrests + crest;
}

// The candidate with the least total error, the first of equal ones.
template <int Weights>
int best_candidate(const uint8_t* errors, const uint16_t* offsets) {
  constexpr int kGroups = TableSearch::kCandidates / 32;
  // sums holds the low bytes' sums plus 256 times the high bytes'.
  Words16 sums[kGroups] = {}, high_sums[kGroups] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Weights; ++i) {
    for (int group = 0; group < kGroups; ++group) {
      const Words16 bytes = *reinterpret_cast<const Words16*>(errors + offsets[i] + 32 * group);
      sums[group] += bytes;
      high_sums[group] += bytes >> 8;
    }
  }
  UInts8 best = UInts8{} + UINT32_MAX;  // total << 8 | candidate
  const UInts8 lanes = {0, 4, 8, 12, 16, 20, 24, 28};
  for (int group = 0; group < kGroups; ++group) {
    const Words16 low_sums = sums[group] - (high_sums[group] << 8);
    const auto even = reinterpret_cast<const UInts8&>(low_sums);  // bytes 0 and 2 of 4
    const auto odd = reinterpret_cast<const UInts8&>(high_sums[group]);
    const UInts8 first = lanes + static_cast<uint32_t>(32 * group);
    const UInts8 keys[4] = {(even & 0xffff) << 8 | first, (odd & 0xffff) << 8 | (first + 1),
                            even >> 16 << 8 | (first + 2), odd >> 16 << 8 | (first + 3)};
    for (const UInts8& key : keys) keep(best, key, key < best);
  }
  return static_cast<int>(reduce(best, [](auto& v, auto& w) { keep(v, w, w < v); }) & 0xff);
}

template <int BlockK>
void encode(const TableSearch& search, EncodeTask& task) {
  constexpr int kWeights = kBlockRows * BlockK;
  constexpr int kVectors = kWeights / 16;
  constexpr int kFlush = 128;  // blocks whose products fit int32
  for (int r = 0; r < kBlockRows; ++r) task.wq[r] = task.qq[r] = 0;
  const int64_t blocks = task.k / BlockK;
  for (int64_t first = 0; first < blocks; first += kFlush) {
    Ints8 wq[kVectors] = {}, qq[kVectors] = {};
    const int64_t end = first + kFlush < blocks ? first + kFlush : blocks;
    for (int64_t b = first; b < end; ++b) {
      alignas(32) int16_t x[kWeights];
      for (int r = 0; r < kBlockRows; ++r)
        std::memcpy(x + r * BlockK, task.rows + r * task.k + b * BlockK, 2 * BlockK);

      const int of = block_class<kWeights>(search, x);
      const int16_t factor = search.bin_factor[of];
      alignas(32) uint16_t offsets[kWeights];
      constexpr int kHalf = TableSearch::kBins / 2;
      for (int i = 0; i < kWeights; ++i) {
        auto bin = static_cast<int16_t>(x[i] * factor >> 16);
        bin = bin < -kHalf ? -kHalf : bin;
        bin = bin > kHalf - 1 ? kHalf - 1 : bin;
        offsets[i] = static_cast<uint16_t>((bin + kHalf) * TableSearch::kCandidates);
      }
      const int best = best_candidate<kWeights>(search.errors[of][0], offsets);
      const int table = search.candidates[of][best];
      task.index[4 * b + task.lane] = static_cast<uint8_t>(table);

      const auto levels = *reinterpret_cast<const Bytes16*>(search.levels[table]);
      alignas(32) uint8_t codes[kWeights];
      for (int v = 0; v < kVectors; ++v) {
        const Shorts16 weights = *reinterpret_cast<const Shorts16*>(x + 16 * v);
        Shorts16 code = {};
        for (int l = 0; l < kTableLevels - 1; ++l) code -= weights > search.thresholds[table][l];
        const Bytes16 bytes = __builtin_convertvector(code, Bytes16);
        *reinterpret_cast<Bytes16*>(codes + 16 * v) = bytes;
        const Bytes16 chosen = __builtin_shuffle(levels, bytes);
        const Shorts16 q =
            __builtin_convertvector(reinterpret_cast<const Levels16&>(chosen), Shorts16);
        // Even and odd columns apart, widened.
        const auto w32 = reinterpret_cast<const Ints8&>(weights);
        const auto q32 = reinterpret_cast<const Ints8&>(q);
        const Ints8 w_odd = w32 >> 16, w_even = w32 << 16 >> 16;
        const Ints8 q_odd = q32 >> 16, q_even = q32 << 16 >> 16;
        wq[v] += w_odd * q_odd + w_even * q_even;
        qq[v] += q_odd * q_odd + q_even * q_even;
      }
      // 8 k share 64 bytes: the first four in the low nibbles, the others in the high ones.
      for (int c = 0; c < BlockK / 8; ++c) {
        for (int r = 0; r < kBlockRows; ++r) {
          uint32_t low, high;
          std::memcpy(&low, codes + r * BlockK + 8 * c, 4);
          std::memcpy(&high, codes + r * BlockK + 8 * c + 4, 4);
          const uint32_t both = low | high << 4;
          std::memcpy(task.codes + (b * (BlockK / 8) + c) * 64 + 16 * task.lane + 4 * r, &both, 4);
        }
      }
    }
    constexpr int kInts = BlockK / 2;  // of a row
    for (int i = 0; i < 8 * kVectors; ++i) {
      task.wq[i / kInts] += wq[i / 8][i % 8];
      task.qq[i / kInts] += qq[i / 8][i % 8];
    }
  }
}

constexpr QuantizeKernels kQuantizeKernels = {
    decode_fp8, largest_bits, round_row, interleave, {encode<16>, encode<8>},
};

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
