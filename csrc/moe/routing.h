// Tokens grouped by expert: what a layer call works through.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

// The (token, slot) pairs that run on the CPU, sorted by expert, tokens ascending within one.
struct Routing {
  std::vector<int32_t> experts;         // experts with at least one token, ascending
  std::vector<int64_t> begin;           // [experts + 1] first pair of each
  std::vector<int32_t> tokens;          // [pairs]
  std::vector<int32_t> pairs_of_token;  // [tokens, top_k] pair of each slot, -1 for a skipped one
  std::vector<float> weights;           // [pairs] routing weight
  std::vector<int64_t> place;           // [num_experts] for group_by_expert

  int64_t pairs() const { return static_cast<int64_t>(tokens.size()); }
};

// `ids` and `weights` are row-major [tokens, top_k]. A slot is skipped when its id is -1 (padding)
// or its expert is marked in `on_gpu` [num_experts]. Throws std::invalid_argument for any other id
// outside [0, num_experts).
void group_by_expert(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k,
                     const uint8_t* on_gpu, int64_t num_experts, Routing& routing);

}  // namespace kt
