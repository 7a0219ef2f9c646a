// Tokens grouped by expert: what a layer call works through.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kt {

// Expert ids as a caller has them, int32 or int64: narrowed only when they are known to fit.
struct ExpertIds {
  const void* data = nullptr;
  bool is_int64 = false;

  int64_t bytes() const { return is_int64 ? 8 : 4; }  // of one
  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct BadId {
  int64_t id;
  int64_t token;
};
std::string describe(const BadId& bad, int64_t num_experts);

// The (token, slot) pairs that run on the CPU, sorted by expert, tokens ascending within one.
struct Routing {
  std::vector<int32_t> experts;         // experts with at least one token, ascending
  std::vector<int64_t> begin;           // [experts + 1] first pair of each
  std::vector<int32_t> tokens;          // [pairs]
  std::vector<int32_t> pairs_of_token;  // [tokens, top_k] pair of each slot, -1 for a skipped one
  std::vector<float> weights;           // [pairs] routing weight
  std::vector<int64_t> place;           // [num_experts] for group_by_expert
  std::vector<int64_t> routed;          // [num_experts] slots of each, on the GPU or here
  std::optional<BadId> bad;             // the first id that is none; its slot is skipped

  int64_t pairs() const { return static_cast<int64_t>(tokens.size()); }
};

// `ids` and `weights` are row-major [tokens, top_k], tokens * top_k in int32. A slot is skipped
// when its id is -1 (padding) or outside [0, num_experts), or its expert is marked in `on_gpu`
// [num_experts]. Each of ids and on_gpu is read once: they may be changed meanwhile.
void group_by_expert(const ExpertIds& ids, const float* weights, int64_t tokens, int64_t top_k,
                     const uint8_t* on_gpu, int64_t num_experts, Routing& routing);

}  // namespace kt
