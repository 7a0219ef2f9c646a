// The sizes of one MoE layer's routed experts, and of each of their three projections.
#pragma once

#include <array>
#include <cstdint>

#include "weights/layout.h"

namespace kt {

constexpr int64_t kMaxExperts = 65536;

struct LayerConfig {
  int64_t num_experts = 0;
  int64_t top_k = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  Method method = Method::kInt4;
};

enum class Projection : uint8_t { kGate, kUp, kDown };
constexpr std::array<Projection, 3> kProjections = {Projection::kGate, Projection::kUp,
                                                    Projection::kDown};

// The same; throws std::invalid_argument for sizes that no layer can have.
LayerConfig checked(const LayerConfig& config);

// Layout of a projection with the intermediate dimension cut to `width`.
ProjectionLayout projection_layout(const LayerConfig& config, Projection projection, int64_t width);

}  // namespace kt
