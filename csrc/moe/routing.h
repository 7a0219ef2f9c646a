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

// Marks the slots that a call defers with 1 and the others with 0, [tokens, top_k]: each token's
// `count` of the smallest weights, of equal ones the later, but for experts that the call computes
// for another token anyway. Their weights would be read twice, which is what few tokens cost.
// Whether any is.
bool mark_deferred(const ExpertIds& ids, const float* weights, int64_t tokens, int64_t top_k,
                   int64_t count, int64_t num_experts, std::vector<uint8_t>& marks);

// Which of a call's slots are meant: those with this mark, or all.
struct Slots {
  const uint8_t* marks = nullptr;
  uint8_t mark = 0;

  bool has(int64_t i) const { return marks == nullptr || marks[i] == mark; }
};

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
// when it is not meant, its id is -1 (padding) or outside [0, num_experts), or its expert is marked
// in `on_gpu` [num_experts]; a bad id is told of any slot. Each of ids and on_gpu is read once:
// they may be changed meanwhile.
void group_by_expert(const ExpertIds& ids, const float* weights, int64_t tokens, int64_t top_k,
                     const Slots& meant, const uint8_t* on_gpu, int64_t num_experts,
                     Routing& routing);

}  // namespace kt
