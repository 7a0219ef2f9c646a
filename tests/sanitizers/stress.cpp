// The threads of the engine and of stream calls under load, for ThreadSanitizer and
// AddressSanitizer: calls from several threads at once, calls on a stream, graphs replayed by
// flags and by host functions, calls that fail, calls that are given up. Prints "done" when every
// result was right.
//
//   stress FAKE_RUNTIME CALLS

#include <sched.h>

#include <atomic>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "base/error.h"
#include "moe/layer_job.h"
#include "stream/staging.h"
#include "stream/stream_layer.h"
#include "targets/dispatch.h"

// tests/csrc/stream/fake_runtime.cpp
extern "C" {
void* fake_malloc(size_t bytes);
void* fake_stream();
void fake_synchronize(void* stream);
void fake_destroy(void* stream);
void fake_begin_capture(void* stream);
void* fake_end_capture(void* stream);
void fake_launch(void* stream, void* graph);
}

namespace {

constexpr int64_t kExperts = 4, kTopK = 2, kHidden = 64, kIntermediate = 128;

uint32_t random_bits(uint32_t& state) { return state = state * 1664525 + 1013904223; }

std::vector<float> random_floats(size_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random_bits(seed) >> 8) * 0x1p-23f - 1.0f;
  return values;
}

struct Inputs {
  explicit Inputs(int64_t count, uint32_t seed = 1)
      : tokens(count),
        x(random_floats(static_cast<size_t>(count * kHidden), seed)),
        weights(random_floats(static_cast<size_t>(count * kTopK), seed + 1)) {
    for (int64_t i = 0; i < count; ++i)
      for (int32_t id : {static_cast<int32_t>(i % kExperts), int32_t((i + 1) % kExperts)})
        ids.push_back(id);
  }
  int64_t tokens;
  std::vector<float> x, weights;
  std::vector<int32_t> ids;
};

// A pass whose first call leaves one expert of each token to the second; both are with the workers
// at once, or one after the other. The second's output.
std::vector<float> pass(kt::Layer& first, kt::Layer& second, const Inputs& in, bool at_once) {
  const auto out = std::make_shared<std::vector<float>>(in.x.size());
  const auto before = std::make_shared<std::vector<float>>(in.x.size());
  const kt::CallInputs inputs{in.x.data(), kt::ActivationDtype::kFp32, in.tokens,
                              kt::ExpertIds{in.ids.data()}, in.weights.data()};
  const kt::CallOutput to_before{{before, before->data()}, kt::ActivationDtype::kFp32, nullptr};
  const kt::Layer::Submitted left = first.submit(inputs, to_before, 1);
  if (left.deferred && !at_once) kt::WorkerPool::wait(*left.deferred->job);
  const kt::CallOutput output{{out, out->data()}, kt::ActivationDtype::kFp32, left.deferred};
  kt::WorkerPool::wait(*second.submit(inputs, output, 0).job);
  return *out;
}

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("failed: %s\n", what);
    std::exit(1);
  }
}

template <class T>
T* to_device(const std::vector<T>& values) {
  void* const memory = fake_malloc(values.size() * sizeof(T));
  std::memcpy(memory, values.data(), values.size() * sizeof(T));
  return static_cast<T*>(memory);
}

struct OnDevice {
  explicit OnDevice(const Inputs& in)
      : tokens(in.tokens),
        x(to_device(in.x)),
        weights(to_device(in.weights)),
        ids(to_device(in.ids)),
        out(to_device(in.x)) {}
  void submit(kt::StreamLayer& layer, void* stream, int64_t deferred = 0,
              kt::StreamLayer* before = nullptr) const {
    layer.submit(stream, {x, kt::ActivationDtype::kFp32, tokens, kt::ExpertIds{ids}, weights},
                 deferred, before);
    layer.sync(stream, out);
  }
  void pass(kt::StreamLayer& first, kt::StreamLayer& second, void* stream) const {
    submit(first, stream, 1);
    submit(second, stream, 0, &first);
  }
  bool holds(const std::vector<float>& want) const {
    return std::memcmp(out, want.data(), want.size() * sizeof(float)) == 0;
  }
  int64_t tokens;
  float *x, *weights;
  int32_t* ids;
  float* out;
};

// As many of the CPUs that this process may use, fewer where there are fewer.
std::vector<int> first_cpus(size_t count) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) kt::fail_runtime("sched_getaffinity failed");
  std::vector<int> cpus;
  for (int id = 0; id < CPU_SETSIZE && cpus.size() < count; ++id)
    if (CPU_ISSET(id, &set)) cpus.push_back(id);
  return cpus;
}

// Copies through staging buffers, more threads than buffers. Some fail, whose source goes at once;
// the last of them have nobody left.
void stage(const std::string& library, int calls) {
  constexpr size_t kBytes = 1000;
  const kt::CudaRuntime runtime = kt::find_cuda_runtime(library);
  auto staging =
      std::make_unique<kt::Staging>(runtime, kt::Staging::Sizes{3, 2, kBytes}, first_cpus(2));
  void* const stream = fake_stream();
  std::vector<uint8_t> source(7 * kBytes + 1);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 7);
  std::vector<uint8_t*> targets;
  for (int i = 0; i < 4; ++i) targets.push_back(to_device(std::vector<uint8_t>(source.size())));
  uint8_t* const small = to_device(std::vector<uint8_t>(2 * kBytes));
  for (int n = 0; n < calls / 10; ++n) {
    staging->copy(source.data(), targets[static_cast<size_t>(n) % targets.size()], source.size(),
                  stream);
    if (n % 4 != 0) continue;
    const auto gone = std::make_unique<std::vector<uint8_t>>(source);
    bool failed = false;
    try {
      staging->copy(gone->data(), small, gone->size(), stream);
    } catch (const std::runtime_error&) {
      failed = true;
    }
    expect(failed, "a copy to too little memory");
  }
  fake_synchronize(stream);
  for (const uint8_t* target : targets)
    expect(std::memcmp(target, source.data(), source.size()) == 0, "staged copies");
  for (uint8_t* target : targets) staging->copy(source.data(), target, source.size(), stream);
  staging.reset();
  fake_synchronize(stream);
  fake_destroy(stream);
}

void run(const std::string& library, const std::vector<std::vector<int>>& cpus, int calls) {
  const auto engine = std::make_shared<kt::Engine>(cpus, 2, kt::find_target("scalar"));
  std::vector<std::shared_ptr<kt::Layer>> layers;
  const std::vector<float> weights =
      random_floats(static_cast<size_t>(kExperts * kHidden * kIntermediate), 7);
  for (int i = 0; i < 2; ++i) {
    layers.push_back(std::make_shared<kt::Layer>(
        kt::LayerConfig{kExperts, kTopK, kHidden, kIntermediate, kt::Method::kInt8}, engine));
    kt::SourceMatrix up{weights.data(), kt::SourceDtype::kFp32, nullptr, kIntermediate, kHidden};
    kt::SourceMatrix down{weights.data(), kt::SourceDtype::kFp32, nullptr, kHidden, kIntermediate};
    layers.back()->load_matrices({up, up, down}, {0, 1, 2, 3});
  }
  std::vector<Inputs> inputs;
  std::vector<std::vector<float>> want;
  for (int64_t tokens : {1, 3, 8, 20}) {
    inputs.emplace_back(tokens);
    want.push_back(pass(*layers[0], *layers[1], inputs.back(), false));
  }

  std::vector<std::thread> threads;
  for (size_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] {
      for (int n = 0; n < calls / 50; ++n) {
        const size_t which = (i + static_cast<size_t>(n)) % inputs.size();
        expect(pass(*layers[i % 2], *layers[(i + 1) % 2], inputs[which], true) == want[which],
               "passes of several threads");
      }
    });
  for (std::thread& thread : threads) thread.join();

  const auto context = std::make_shared<kt::StreamContext>(kt::find_cuda_runtime(library));
  context->use_flags(library, std::chrono::minutes(1), std::chrono::milliseconds(10));
  kt::StreamLayer first(context, layers[0], 0), second(context, layers[1], 1);
  void* const stream = fake_stream();
  std::vector<OnDevice> batches(inputs.begin(), inputs.end());
  std::atomic<bool> stop{false};
  std::thread watch([&] {
    while (!stop) context->end_overdue(std::chrono::minutes(1));
  });
  for (int n = 0; n < calls / 2; ++n) {
    const OnDevice& batch = batches[static_cast<size_t>(n) % batches.size()];
    batch.pass(first, second, stream);
    if (n % 64 == 0) fake_synchronize(stream);
  }
  fake_synchronize(stream);
  for (size_t i = 0; i < batches.size(); ++i) expect(batches[i].holds(want[i]), "stream calls");

  const auto capture = [&](const OnDevice& batch, int times, bool flags) {
    context->set_flags(flags);
    fake_begin_capture(stream);
    for (int n = 0; n < times; ++n) {
      batch.pass(first, second, stream);
    }
    return fake_end_capture(stream);
  };
  void* const flagged = capture(batches[1], 30, true);
  void* const by_host_functions = capture(batches[1], 10, false);
  void* const large = capture(batches[3], 1, true);
  for (int n = 0; n < calls / 600; ++n) {
    fake_launch(stream, flagged);
    fake_launch(stream, by_host_functions);
    if (n % 4 != 0) continue;
    fake_synchronize(stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));  // the thread of flags sleeps then
  }
  fake_synchronize(stream);
  expect(batches[1].holds(want[1]), "replayed calls");
  stop = true;
  watch.join();
  expect(context->failure().empty(), context->failure().c_str());

  // Given up while the workers are at it, and ids that are none.
  std::thread impatient([&] {
    while (context->failure().empty()) context->end_overdue(std::chrono::milliseconds(0));
  });
  try {
    while (context->failure().empty()) {
      batches[3].submit(first, stream);
      fake_launch(stream, large);
    }
  } catch (const std::runtime_error& refusal) {
    expect(!context->failure().empty(), refusal.what());
  }
  impatient.join();
  fake_synchronize(stream);
  engine->pool.drain();
  const auto other = std::make_shared<kt::StreamContext>(kt::find_cuda_runtime(library));
  kt::StreamLayer third(other, layers[0], 0);
  batches[0].ids[0] = 99;
  batches[0].submit(third, stream);
  fake_synchronize(stream);
  expect(!other->failure().empty(), "a bad expert id was not found");
  fake_destroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string_view number(argv[2]);
  int calls = 0;
  const auto [end, code] = std::from_chars(number.begin(), number.end(), calls);
  if (code != std::errc() || end != number.end() || calls < 1) return 2;
  try {
    // One group of workers, and two that do not wait for each other between phases.
    const std::vector<int> cpus = first_cpus(2);
    run(argv[1], {cpus}, calls / 2);
    run(argv[1], {{cpus.front()}, {cpus.back()}}, calls / 2);
    stage(argv[1], calls);
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
  std::printf("done\n");
  return 0;
}
