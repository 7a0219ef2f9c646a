#include "moe/routing.h"

#include <algorithm>

#include "base/error.h"

namespace kt {

std::string describe(const BadId& bad, int64_t num_experts) {
  return concat("expert id ", bad.id, " of token ", bad.token, " is outside [0, ", num_experts,
                ")");
}

bool mark_deferred(const ExpertIds& ids, const float* weights, int64_t tokens, int64_t top_k,
                   int64_t count, int64_t num_experts, std::vector<uint8_t>& marks) {
  const int64_t slots = tokens * top_k;
  marks.assign(static_cast<size_t>(slots), 0);
  for (int64_t first = 0; first < slots; first += top_k) {
    for (int64_t n = 0; n < std::min(count, top_k); ++n) {
      int64_t lightest = -1;
      for (int64_t i = first; i < first + top_k; ++i)
        if (marks[static_cast<size_t>(i)] == 0 && (lightest < 0 || weights[i] <= weights[lightest]))
          lightest = i;
      marks[static_cast<size_t>(lightest)] = 1;
    }
  }
  const auto known = [&](int64_t id) { return id >= 0 && id < num_experts; };
  std::vector<uint8_t> now(static_cast<size_t>(num_experts));
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = ids[i];
    if (marks[static_cast<size_t>(i)] == 0 && known(id)) now[static_cast<size_t>(id)] = 1;
  }
  bool any = false;
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = ids[i];
    uint8_t& mark = marks[static_cast<size_t>(i)];
    if (!known(id) || now[static_cast<size_t>(id)] != 0) mark = 0;
    any = any || mark != 0;
  }
  return any;
}

void group_by_expert(const ExpertIds& ids, const float* weights, int64_t tokens, int64_t top_k,
                     const Slots& meant, const uint8_t* on_gpu, int64_t num_experts,
                     Routing& routing) {
  const int64_t slots = tokens * top_k;
  std::vector<int64_t>& place = routing.place;  // count, then next position
  place.assign(static_cast<size_t>(num_experts), 0);
  routing.routed.assign(static_cast<size_t>(num_experts), 0);
  std::vector<int32_t>& slot = routing.pairs_of_token;  // its expert at first
  slot.assign(static_cast<size_t>(slots), -1);
  routing.bad.reset();
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = ids[i];
    if (id < 0 || id >= num_experts) {
      if (id != -1 && !routing.bad) routing.bad = {id, i / top_k};
      continue;
    }
    if (!meant.has(i)) continue;
    ++routing.routed[static_cast<size_t>(id)];
    if (on_gpu[id]) continue;
    ++place[static_cast<size_t>(id)];
    slot[static_cast<size_t>(i)] = static_cast<int32_t>(id);
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
  for (int64_t i = 0; i < slots; ++i) {
    int32_t& expert = slot[static_cast<size_t>(i)];
    if (expert < 0) continue;
    const auto pair = static_cast<size_t>(place[static_cast<size_t>(expert)]++);
    routing.tokens[pair] = static_cast<int32_t>(i / top_k);
    routing.weights[pair] = weights[i];
    expert = static_cast<int32_t>(pair);
  }
}

}  // namespace kt
