#include "moe/slice.h"

namespace kt {
namespace {

constexpr int64_t kAlign = 64;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

Slice::Slice(const LayerConfig& config, int64_t begin, int64_t end)
    : config_(config), begin_(begin), end_(end) {
  for (Projection projection : kProjections) {
    const ProjectionLayout p = layout(projection);
    projection_offset_[static_cast<size_t>(projection)] = slot_bytes_;
    slot_bytes_ += align(p.codes_bytes()) + align(p.index_bytes()) + align(p.scales_bytes());
  }
}

PackedProjection Slice::packed(int64_t slot, Projection projection) const {
  const ProjectionLayout p = layout(projection);
  uint8_t* codes =
      weights_.data() + slot * slot_bytes_ + projection_offset_[static_cast<size_t>(projection)];
  uint8_t* index = codes + align(p.codes_bytes());
  return {codes, index, reinterpret_cast<uint16_t*>(index + align(p.index_bytes()))};
}

std::array<int64_t, 3> Slice::part_offsets(Projection projection) const {
  const ProjectionLayout p = layout(projection);
  const int64_t codes = projection_offset_[static_cast<size_t>(projection)];
  const int64_t index = codes + align(p.codes_bytes());
  return {codes, index, index + align(p.index_bytes())};
}

Matrix Slice::matrix(int64_t slot, Projection projection) const {
  const ProjectionLayout p = layout(projection);
  const PackedProjection memory = packed(slot, projection);
  return {memory.codes, memory.table_index,  memory.scales,
          p.k,          p.codes_per_panel(), p.index_per_panel()};
}

void Slice::touch(int64_t slot) const {
  uint8_t* const begin = weights_.data() + slot * slot_bytes_;
  for (int64_t i = 0; i < slot_bytes_; i += Buffer::kSmallPage) begin[i] = 0;
  begin[slot_bytes_ - 1] = 0;
}

}  // namespace kt
