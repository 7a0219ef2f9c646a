#include "moe/layer_config.h"

#include <utility>

#include "base/error.h"

namespace kt {

LayerConfig checked(const LayerConfig& config) {
  if (config.num_experts < 1 || config.num_experts > kMaxExperts)
    fail_argument("num_experts is ", config.num_experts, ": expected 1 to ", kMaxExperts);
  if (config.top_k < 1 || config.top_k > config.num_experts)
    fail_argument("top_k is ", config.top_k, ": expected 1 to ", config.num_experts);
  for (const auto& [name, value] : {std::pair{"hidden_size", config.hidden_size},
                                    std::pair{"intermediate_size", config.intermediate_size}})
    if (value < kDimMultiple || value > kMaxDim || value % kDimMultiple != 0)
      fail_argument(name, " is ", value, ": expected a positive multiple of ", kDimMultiple,
                    " up to ", kMaxDim);
  return config;
}

ProjectionLayout projection_layout(const LayerConfig& config, Projection projection,
                                   int64_t width) {
  if (projection == Projection::kDown) return {config.hidden_size, width, config.method};
  return {width, config.hidden_size, config.method};
}

}  // namespace kt
