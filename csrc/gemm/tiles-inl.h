// panels-inl.h on matrix tiles: two panels by up to 32 tokens at a time.
//
// Int4 panels are unpacked slab by slab: the next slab, and in a worker's memory, between the
// products of the one before, so that a CPU may do both at once. What the next panels need is
// fetched on the way, evenly, never in bursts that tile loads would queue behind.
// docs/performance.md has what this gains on the machine it was measured on.

namespace kt::KT_TARGET_NAMESPACE {
namespace {

// k of a slab of int4 panels.
constexpr int64_t kTileSlabK = 1024;

// Tokens that share an unpacked slab.
constexpr int64_t kTileChunk = 256;

struct TileWorkspace {
  alignas(64) uint8_t slab[2][2][kTileSlabK * kTileRows];  // [this and the next][panel]
  TileSums sums[kTileChunk / kTileRows];
};

// A slab of two int4 panels, unpacked in units of 16 k of one panel.
template <int BlockK>
class SlabUnpacker {
 public:
  SlabUnpacker(const Panels<2>& panels, uint8_t (&out)[2][kTileSlabK * kTileRows], int64_t begin,
               int64_t end)
      : panels_(panels), out_(out), block_(begin / 16), blocks_((end - begin) / 16) {}

  int64_t units() const { return 2 * blocks_; }

  // Unpacks up to `count` of the units that are left.
  void run(int64_t count) {
    const int64_t end = done_ + count < units() ? done_ + count : units();
    for (; done_ < end; ++done_) {
      const int64_t p = done_ & 1, b = done_ >> 1;
      const uint8_t* codes = panels_.codes[p] + 128 * (block_ + b);
      uint8_t* out = out_[p] + 256 * b;
      const uint8_t* index = panels_.index[p] + 4 * (16 / BlockK) * (block_ + b);
      Tables tables = load_tables(panels_.tables, index);
      for (int half = 0; half < 2; ++half) {
        if (half > 0 && BlockK == 8) tables = load_tables(panels_.tables, index + 4);
        Weights low, high;
        unpack(codes + 64 * half, tables, low, high);
        store_weights(out + 128 * half, low);
        store_weights(out + 128 * half + 64, high);
      }
    }
  }

 private:
  const Panels<2>& panels_;
  uint8_t (&out_)[2][kTileSlabK * kTileRows];
  const int64_t block_, blocks_;
  int64_t done_ = 0;
};

// Up to 32 tokens over the k of one slab.
template <int Blocks, int BlockK>
inline void multiply_tile_slab(const uint8_t* const (&w)[2], const uint8_t* x, int64_t stride,
                               int64_t k, bool first, SlabUnpacker<BlockK>& unpacker, int64_t units,
                               Fetcher& fetcher, TileSums* sums) {
  if (first) {
    zero_sums<Blocks>();
  } else {
    load_sums<Blocks>(sums);
  }
  for (int64_t at = 0; at < k; at += kTileK) {
    fetcher.run<prefetch_second_level>();
    if constexpr (BlockK > 0) unpacker.run(units);
    multiply_tiles<Blocks, (BlockK > 0)>(w[0] + at * kTileRows, w[1] + at * kTileRows, x + at,
                                         stride);
  }
  store_sums<Blocks>(sums);
}

// Calls finish(i, sums) for every i in [0, count) as multiply_panels does. Tiles must be
// configured.
template <int BlockK, class Finish>
void multiply_tile_panels(const Panels<2>& panels, const Rows& x, int64_t count, uint8_t* workspace,
                          const Finish& finish) {
  constexpr bool kInt4 = BlockK > 0;
  auto& w = *reinterpret_cast<TileWorkspace*>(workspace);
  // Int8 panels are tiles as they stand: one slab.
  const int64_t slab_k = kInt4 && kTileSlabK < panels.k ? kTileSlabK : panels.k;
  for (int64_t chunk = 0; chunk < count; chunk += kTileChunk) {
    const int64_t tokens = count - chunk < kTileChunk ? count - chunk : kTileChunk;
    const int64_t blocks = divide_up(tokens, 2 * kTileRows);
    const bool last_chunk = chunk + tokens == count;
    const int64_t bytes = last_chunk ? code_bytes<BlockK>(panels.k) : 0;
    Fetcher fetcher(panels.next, bytes, blocks * (panels.k / kTileK));
    if constexpr (kInt4) SlabUnpacker<BlockK>(panels, w.slab[0], 0, slab_k).run(2 * slab_k);
    for (int64_t begin = 0, slab = 0; begin < panels.k; begin += slab_k, ++slab) {
      const int64_t end = begin + slab_k < panels.k ? begin + slab_k : panels.k;
      const int64_t next_end = end + slab_k < panels.k ? end + slab_k : panels.k;
      // Nothing to unpack beside the last slab.
      SlabUnpacker<BlockK> unpacker(panels, w.slab[(slab + 1) & 1], end, next_end);
      const int64_t units = divide_up(unpacker.units(), blocks * ((end - begin) / kTileK));
      const uint8_t* tiles[2];
      for (int p = 0; p < 2; ++p)
        tiles[p] = kInt4 ? w.slab[slab & 1][p] : panels.codes[p] + begin * kTileRows;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * 2 * kTileRows;
        const uint8_t* rows = x.data + (chunk + first) * x.stride + begin;
        TileSums* sums = w.sums + 2 * block;
        if (tokens - first > kTileRows) {
          multiply_tile_slab<2, BlockK>(tiles, rows, x.stride, end - begin, begin == 0, unpacker,
                                        units, fetcher, sums);
        } else {
          multiply_tile_slab<1, BlockK>(tiles, rows, x.stride, end - begin, begin == 0, unpacker,
                                        units, fetcher, sums);
        }
        if (end < panels.k) continue;
        for (int64_t i = first; i < first + 2 * kTileRows && i < tokens; ++i) {
          const TileSums& s = w.sums[i / kTileRows];
          finish(chunk + i, {load_acc(s.v[0][i % kTileRows]), load_acc(s.v[1][i % kTileRows])});
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt::KT_TARGET_NAMESPACE
