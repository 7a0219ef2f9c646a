// One MoE layer's routed experts: weights in memory, and the call.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "numa/pool.h"
#include "targets/kernels.h"
#include "weights/quantize.h"

namespace kt {

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

enum class ActivationDtype : uint8_t { kFp32, kBf16 };

class LayerJob;

// Memory that calls of all layers of an engine use in turn; jobs run one after the other.
struct Scratch {
  Buffer x_q, x_scales;     // quantised inputs
  Buffer h, h_q, h_scales;  // intermediate rows of all pairs, float and quantised
  Buffer out;               // fp32 sums
  Buffer workspace;         // of each worker in turn
};

// Worker threads, the target they run and the memory of their jobs; shared by all layers.
class Engine {
 public:
  Engine(std::vector<int> cpus, const Kernels& kernels) : kernels(kernels), pool(std::move(cpus)) {}

  // Queues a layer call once the scratch memory suffices for it.
  void submit(const std::shared_ptr<LayerJob>& job);

  // Memory for a snapshot of inputs, reused between calls.
  Buffer take_buffer(size_t bytes);
  void give_buffer(Buffer buffer);

  const Kernels& kernels;
  Scratch scratch;

 private:
  std::mutex mutex_;
  std::vector<Buffer> free_buffers_;

 public:
  WorkerPool pool;  // last: its workers end before the memory goes
};

// Byte offsets in a packed file of the three stacked tensors of one projection.
struct FileOffsets {
  int64_t codes = 0;
  int64_t table_index = 0;
  int64_t scales = 0;
};

class Layer {
 public:
  Layer(LayerConfig config, std::shared_ptr<Engine> engine);
  ~Layer();  // waits for its calls

  const LayerConfig& config() const { return config_; }
  ProjectionLayout layout(Projection projection) const;

  // Reads the experts of a packed file: slot s gets the file's expert source[s], or nothing where
  // that is -1. `tables` is [256][16], null for int8. All workers read; the file was checked by the
  // caller. Throws std::runtime_error when the file cannot be read to the end.
  void load_file(const std::string& path, const std::array<FileOffsets, 3>& offsets,
                 const int8_t* tables, const std::vector<int64_t>& source);

  // Quantises every expert from row-major [num_experts, n, k] matrices of the three projections;
  // slot s gets expert source[s].
  void load_matrices(const std::array<SourceMatrix, 3>& stacked,
                     const std::vector<int64_t>& source);

  bool loaded() const { return loaded_; }
  int64_t weight_bytes() const { return static_cast<int64_t>(weights_.bytes()); }

  // Queues out = sum over top-k of weight * expert(x) for `tokens` rows. Takes a copy of x, ids and
  // weights before it returns; `out` [tokens, hidden] must stay until the job has been waited for.
  // x and out are of `dtype`. Throws std::invalid_argument for a bad expert id.
  std::shared_ptr<Job> submit(const void* x, ActivationDtype dtype, int64_t tokens,
                              const int32_t* ids, const float* weights, const uint8_t* on_gpu,
                              void* out);

 private:
  friend class LayerJob;

  uint8_t* part(int64_t slot, Projection projection) const;
  Matrix matrix(int64_t slot, Projection projection) const;
  PackedProjection packed(int64_t slot, Projection projection) const;

  const LayerConfig config_;
  const std::shared_ptr<Engine> engine_;
  std::array<int64_t, 3> part_offset_{};  // of each projection in a slot
  int64_t slot_bytes_ = 0;
  Buffer weights_;
  Buffer tables_;  // as the target wants them
  bool loaded_ = false;
};

}  // namespace kt
