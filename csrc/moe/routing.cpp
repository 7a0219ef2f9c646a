#include "moe/routing.h"

#include "base/error.h"

namespace kt {

void group_by_expert(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k,
                     const uint8_t* on_gpu, int64_t num_experts, Routing& routing) {
  const int64_t slots = tokens * top_k;
  std::vector<int64_t>& place = routing.place;  // count, then next position
  place.assign(static_cast<size_t>(num_experts), 0);
  for (int64_t i = 0; i < slots; ++i) {
    const int32_t id = ids[i];
    if (id == -1) continue;
    if (id < 0 || id >= num_experts)
      fail_argument("expert id ", id, " of token ", i / top_k, " is outside [0, ", num_experts,
                    ")");
    if (!on_gpu[id]) ++place[static_cast<size_t>(id)];
  }
  routing.experts.clear();
  routing.begin.assign(1, 0);
  int64_t pairs = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = place[static_cast<size_t>(e)];
    place[static_cast<size_t>(e)] = pairs;
    if (count == 0) continue;
    pairs += count;
    routing.experts.push_back(static_cast<int32_t>(e));
    routing.begin.push_back(pairs);
  }
  routing.tokens.resize(static_cast<size_t>(pairs));
  routing.weights.resize(static_cast<size_t>(pairs));
  routing.pairs_of_token.assign(static_cast<size_t>(slots), -1);
  for (int64_t i = 0; i < slots; ++i) {
    const int32_t id = ids[i];
    if (id < 0 || on_gpu[id]) continue;
    const auto pair = static_cast<size_t>(place[static_cast<size_t>(id)]++);
    routing.tokens[pair] = static_cast<int32_t>(i / top_k);
    routing.weights[pair] = weights[i];
    routing.pairs_of_token[static_cast<size_t>(i)] = static_cast<int32_t>(pair);
  }
}

}  // namespace kt
