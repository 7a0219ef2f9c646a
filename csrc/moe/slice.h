// One slice of a layer: of every expert the rows [begin, end) of gate and up and the columns
// [begin, end) of down, so that one NUMA node's workers compute their part of an expert's
// intermediate row and multiply it out without asking another node for anything.
#pragma once

#include <array>
#include <cstdint>

#include "base/buffer.h"
#include "moe/layer_config.h"
#include "targets/kernels.h"
#include "weights/quantize.h"

namespace kt {

// What a packed projection consists of, in the order of PackedProjection.
enum class Part : uint8_t { kCodes, kTableIndex, kScales };

class Slice {
 public:
  // `begin` and `end` are multiples of kDimMultiple.
  Slice(const LayerConfig& config, int64_t begin, int64_t end);

  int64_t width() const { return end_ - begin_; }
  ProjectionLayout layout(Projection projection) const {
    return projection_layout(config_, projection, width());
  }
  Matrix matrix(int64_t slot, Projection projection) const;
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  // Where the parts of a projection begin in each slot, in bytes, by Part.
  std::array<int64_t, 3> part_offsets(Projection projection) const;
  int64_t slot_bytes() const { return slot_bytes_; }
  const Buffer& weights() const { return weights_; }

  // Address space for all experts. Pages come with the first write, on the writer's NUMA node:
  // `touch` writes to each page of one expert.
  void reserve() { weights_.reserve(static_cast<size_t>(config_.num_experts * slot_bytes_)); }
  void touch(int64_t slot) const;

  // Calls f(part, from, bytes, to) for every run of bytes that this slice has of one projection of
  // an expert: `from` counts from the start of that part of the whole projection, `to` is the place
  // in this slice.
  template <class F>
  void for_each_run(int64_t slot, Projection projection, F f) const {
    const ProjectionLayout whole =
        projection_layout(config_, projection, config_.intermediate_size);
    const ProjectionLayout mine = layout(projection);
    const PackedProjection to = packed(slot, projection);
    auto* const scales = reinterpret_cast<uint8_t*>(to.scales);
    if (projection != Projection::kDown) {
      const int64_t panel = begin_ / kPanelRows;
      f(Part::kCodes, panel * whole.codes_per_panel(), mine.codes_bytes(), to.codes);
      if (mine.index_bytes() > 0)
        f(Part::kTableIndex, panel * whole.index_per_panel(), mine.index_bytes(), to.table_index);
      f(Part::kScales, begin_ * int64_t{sizeof(uint16_t)}, mine.scales_bytes(), scales);
      return;
    }
    // The columns before this slice are a layout of their own: its panel is where ours begins.
    const ProjectionLayout before = projection_layout(config_, projection, begin_);
    strided(Part::kCodes, before.codes_per_panel(), mine.codes_per_panel(), whole.codes_per_panel(),
            mine.panels(), to.codes, f);
    if (mine.index_bytes() > 0)
      strided(Part::kTableIndex, before.index_per_panel(), mine.index_per_panel(),
              whole.index_per_panel(), mine.panels(), to.table_index, f);
    f(Part::kScales, 0, mine.scales_bytes(), scales);
  }

 private:
  PackedProjection packed(int64_t slot, Projection projection) const;

  template <class F>
  static void strided(Part part, int64_t from, int64_t bytes, int64_t stride, int64_t count,
                      uint8_t* to, F& f) {
    if (bytes == stride) return f(part, from, bytes * count, to);
    for (int64_t i = 0; i < count; ++i) f(part, from + i * stride, bytes, to + i * bytes);
  }

  const LayerConfig config_;
  const int64_t begin_, end_;
  std::array<int64_t, 3> projection_offset_{};  // in a slot
  int64_t slot_bytes_ = 0;
  Buffer weights_;
};

}  // namespace kt
