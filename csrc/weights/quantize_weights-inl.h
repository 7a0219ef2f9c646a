// The packer's loops. Included by each target: vector types and plain loops that the compiler turns
// into the target's instructions, so no ISA header is needed. Integers, and floats lane by lane in
// one order: every target gives the same bytes.
#pragma once

#include <cstdint>
#include <cstring>

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
using Ints4 = int32_t KT_VECTOR(16);
using ULongs2 = uint64_t KT_VECTOR(16);
using Bytes16 = uint8_t KT_VECTOR(16);
using Levels16 = int8_t KT_VECTOR(16);
#undef KT_VECTOR

// Values are built from their bits; those below 8 are subnormal and have no hidden bit.
void decode_fp8(const uint8_t* bytes, const float* scales, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 16) {
    // By way of 16 bits: compilers take 8 bytes to 32 bits one by one.
    const auto values =
        __builtin_convertvector(*reinterpret_cast<const Bytes16*>(bytes + i), Shorts16);
    for (int half = 0; half < 2; ++half) {
      const auto value =
          __builtin_convertvector(reinterpret_cast<const Shorts8*>(&values)[half], Ints8);
      const Ints8 magnitude = value & 0x7f;
      const Floats8 small = __builtin_convertvector(magnitude, Floats8) * 0x1p-9f;
      const Ints8 normal = (magnitude << 20) + (120 << 23);
      const Ints8 finite = magnitude < 8 ? reinterpret_cast<const Ints8&>(small) : normal;
      const Ints8 nan = (magnitude == 0x7f) & 0x7fc00000;
      const Ints8 bits = finite | nan | (value & 0x80) << 24;
      *reinterpret_cast<Floats8*>(out + i + 8 * half) =
          reinterpret_cast<const Floats8&>(bits) * scales[i / 128];
    }
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

// Folds the eight lanes with `fold(v, w)`, which leaves its result in v: a vector that is returned
// would make the calling convention depend on the target.
template <class Fold>
inline int32_t reduce(const Ints8& lanes, Fold fold) {
  Ints8 v = lanes;
  Ints8 w = __builtin_shuffle(v, Ints8{4, 5, 6, 7, 0, 1, 2, 3});
  fold(v, w);
  w = __builtin_shuffle(v, Ints8{2, 3, 0, 1, 6, 7, 4, 5});
  fold(v, w);
  w = __builtin_shuffle(v, Ints8{1, 0, 3, 2, 5, 4, 7, 6});
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
  const UInts8 sums32 = (pairs & 0xffff) + (pairs >> 16);
  const int32_t sum =
      reduce(reinterpret_cast<const Ints8&>(sums32), [](Ints8& v, const Ints8& w) { v += w; });
  const auto top_pairs = reinterpret_cast<const Ints8&>(tops);  // not negative
  const Ints8 even = top_pairs & 0xffff, odd = top_pairs >> 16;
  const int32_t top =
      reduce(even > odd ? even : odd, [](Ints8& v, const Ints8& w) { v = v > w ? v : w; }) >> 4;
  int spread = 0;
  for (int32_t edge : search.spread_edges) spread += sum >= edge;
  const auto square = static_cast<float>(top * top);
  const auto least = static_cast<float>(sum > 1 ? sum : 1);
  int crest = 0;
  for (float edge : search.crest_edges[spread]) crest += square >= edge * least;
  return spread * TableSearch::kCrests + crest;
}

// The candidate with the least total error; of equal ones, the one with the smallest key.
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
  // A key is total << 6 | group << 5 | high byte << 4 | column of words, made in 16 bits as far as
  // they reach.
  static_assert(kGroups == 2 && Weights * UINT8_MAX < 1 << 14);
  Words16 keys = Words16{} + UINT16_MAX;
  for (int group = 0; group < kGroups; ++group) {
    const auto which = static_cast<uint16_t>(2 * group);
    const Words16 low = (sums[group] - (high_sums[group] << 8)) << 2 | which;
    const Words16 high = high_sums[group] << 2 | static_cast<uint16_t>(which + 1);
    keys = low < keys ? low : keys;
    keys = high < keys ? high : keys;
  }
  const auto pairs = reinterpret_cast<const Ints8&>(keys);
  const Ints8 columns = {0, 2, 4, 6, 8, 10, 12, 14};
  const Ints8 even = (pairs & 0xffff) << 4 | columns;
  const Ints8 odd = (pairs >> 16 & 0xffff) << 4 | (columns + 1);
  const int32_t least =
      reduce(even < odd ? even : odd, [](Ints8& v, const Ints8& w) { v = v < w ? v : w; });
  const int group = least >> 5 & 1, byte = least >> 4 & 1, column = least & 15;
  return 32 * group + 2 * column + byte;
}

// The codes of a block's weights and their levels, q. In the panel's order: each 8 k of a row share
// four bytes, the first four k in the low nibbles and the others in the high ones; the four rows'
// bytes lie together, and those of the next 8 k 64 bytes further.
template <int BlockK>
void encode_block(const TableSearch& search, int table, const int16_t* x, int16_t* q,
                  uint8_t* panel) {
  constexpr int kVectors = kBlockRows * BlockK / 16;
  const auto levels = *reinterpret_cast<const Bytes16*>(search.levels[table]);
  Ints4 shared[kVectors];  // of each pair of ints the first counts
  for (int v = 0; v < kVectors; ++v) {
    const Shorts16 weights = *reinterpret_cast<const Shorts16*>(x + 16 * v);
    Shorts16 code = {};
    for (int l = 0; l < kTableLevels - 1; ++l) code -= weights > search.thresholds[table][l];
    const Bytes16 bytes = __builtin_convertvector(code, Bytes16);
    const Bytes16 chosen = __builtin_shuffle(levels, bytes);
    *reinterpret_cast<Shorts16*>(q + 16 * v) =
        __builtin_convertvector(reinterpret_cast<const Levels16&>(chosen), Shorts16);
    const auto halves = reinterpret_cast<const ULongs2&>(bytes);
    const ULongs2 both = halves | halves >> 28;
    shared[v] = reinterpret_cast<const Ints4&>(both);
  }
  Ints4 rows[2];  // pairs of ints again
  for (int v = 0; v < kVectors; v += 2)
    rows[v / 2] = __builtin_shuffle(shared[v], shared[v + 1], Ints4{0, 2, 4, 6});
  if constexpr (BlockK == 16) {
    const Ints4 first = __builtin_shuffle(rows[0], rows[1], Ints4{0, 2, 4, 6});
    const Ints4 second = __builtin_shuffle(rows[0], rows[1], Ints4{1, 3, 5, 7});
    std::memcpy(panel, &first, 16);
    std::memcpy(panel + 64, &second, 16);
  } else {
    std::memcpy(panel, &rows[0], 16);
  }
}

template <int BlockK>
void encode(const TableSearch& search, EncodeTask& task) {
  constexpr int kWeights = kBlockRows * BlockK;
  constexpr int kColumns = 512;  // of a row, so that their products' sum fits int32
  constexpr int kBlocks = kColumns / BlockK;
  alignas(32) int16_t x[kBlocks][kWeights], q[kBlocks][kWeights];
  uint8_t classes[kBlocks], tables[kBlocks];
  for (int r = 0; r < kBlockRows; ++r) task.wq[r] = task.qq[r] = 0;
  for (int64_t k = 0; k < task.k; k += kColumns) {
    const auto blocks = static_cast<int>((task.k - k < kColumns ? task.k - k : kColumns) / BlockK);
    // In passes: within one, a block's chain of latencies overlaps with those of the next.
    for (int b = 0; b < blocks; ++b)
      for (int r = 0; r < kBlockRows; ++r)
        std::memcpy(x[b] + r * BlockK, task.rows + r * task.k + k + b * BlockK, 2 * BlockK);
    for (int b = 0; b < blocks; ++b)
      classes[b] = static_cast<uint8_t>(block_class<kWeights>(search, x[b]));
    for (int b = 0; b < blocks; ++b) {
      const int16_t factor = search.bin_factor[classes[b]];
      alignas(32) uint16_t offsets[kWeights];
      constexpr int kHalf = TableSearch::kBins / 2;
      for (int i = 0; i < kWeights; ++i) {
        auto bin = static_cast<int16_t>(x[b][i] * factor >> 16);
        bin = bin < -kHalf ? -kHalf : bin;
        bin = bin > kHalf - 1 ? kHalf - 1 : bin;
        offsets[i] = static_cast<uint16_t>((bin + kHalf) * TableSearch::kCandidates);
      }
      const int best = best_candidate<kWeights>(search.errors[classes[b]][0], offsets);
      tables[b] = search.candidates[classes[b]][best];
    }
    for (int b = 0; b < blocks; ++b) {
      const int64_t block = k / BlockK + b;
      task.index[4 * block + task.lane] = tables[b];
      encode_block<BlockK>(search, tables[b], x[b], q[b],
                           task.codes + block * BlockK * 8 + 16 * task.lane);
    }
    for (int r = 0; r < kBlockRows; ++r) {
      int32_t wq = 0, qq = 0;
      for (int b = 0; b < blocks; ++b) {
        for (int i = r * BlockK; i < (r + 1) * BlockK; ++i) {
          wq += x[b][i] * q[b][i];
          qq += q[b][i] * q[b][i];
        }
      }
      task.wq[r] += wq;
      task.qq[r] += qq;
    }
  }
}

template <int BlockK>
constexpr auto encode_or_null = encode<BlockK>;
template <>
constexpr auto encode_or_null<0> = nullptr;

#define KT_ROW(method, name, bits, block_k) encode_or_null<block_k>,
constexpr QuantizeKernels kQuantizeKernels = {
    .decode_fp8 = decode_fp8,
    .largest_bits = largest_bits,
    .round_row = round_row,
    .interleave = interleave,
    .encode = {KT_METHODS(KT_ROW)},
};
#undef KT_ROW

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
