// One MoE layer's routed experts: weights in memory, and the call.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "moe/engine.h"
#include "moe/slice.h"

namespace kt {

enum class ActivationDtype : uint8_t { kFp32, kBf16 };

// Which experts the GPU has, [num_experts]. Whoever holds it may change it between calls.
struct ExpertMask {
  explicit ExpertMask(size_t num_experts) : on_gpu(num_experts) {}
  std::vector<uint8_t> on_gpu;
};

// What a call reads: x [tokens, hidden] of `dtype`, ids and weights [tokens, top_k].
struct CallInputs {
  const void* x = nullptr;
  ActivationDtype dtype = ActivationDtype::kFp32;
  int64_t tokens = 0;
  ExpertIds ids;
  const float* weights = nullptr;
};

// Byte offsets in a packed file of the three stacked tensors of one projection, by Part.
using FileOffsets = std::array<int64_t, 3>;

class LayerJob;

// What a call leaves for the output of the next MoE layer's call on the same batch.
struct Deferred {
  std::shared_ptr<LayerJob> job;
  std::shared_ptr<uint8_t> sums;  // fp32 [tokens, width], complete when the job has ended well
  int64_t tokens = 0;
  int64_t width = 0;
};

struct CallOutput {
  std::shared_ptr<void> rows;  // [tokens, hidden] of `dtype`, held for as long as they are written
  ActivationDtype dtype = ActivationDtype::kFp32;
  std::shared_ptr<Deferred> before;  // added before rounding; null is nothing
};

class Layer {
 public:
  // The intermediate size is cut into as many slices as the engine has, in multiples of
  // kDimMultiple; into fewer where it is too small for that. Without a mask the GPU has no experts.
  Layer(LayerConfig config, std::shared_ptr<Engine> engine,
        std::shared_ptr<const ExpertMask> on_gpu = nullptr);
  ~Layer();  // waits for its calls

  const LayerConfig& config() const { return config_; }
  const std::vector<Slice>& slices() const { return slices_; }
  const uint8_t* tables() const { return tables_.data(); }
  const uint8_t* on_gpu() const { return on_gpu_->on_gpu.data(); }
  ProjectionLayout layout(Projection projection) const {
    return projection_layout(config_, projection, config_.intermediate_size);
  }

  // Reads the experts of a packed file: slot s gets the file's expert source[s], or nothing where
  // that is -1. `tables` is [256][16], null for int8. All workers read, each into its node's
  // memory; the file was checked by the caller. Throws std::runtime_error when the file cannot be
  // read to the end.
  void load_file(const std::string& path, const std::array<FileOffsets, 3>& offsets,
                 const int8_t* tables, const std::vector<int64_t>& source);

  // Quantises every expert from row-major [num_experts, n, k] matrices of the three projections;
  // slot s gets expert source[s].
  void load_matrices(const std::array<SourceMatrix, 3>& stacked,
                     const std::vector<int64_t>& source);

  // Bytes of the weights in memory.
  int64_t weight_bytes() const { return weight_bytes_; }

  // How often the ids of ended calls named each expert, [num_experts], on the GPU or here; calls
  // may run meanwhile.
  std::vector<int64_t> token_counts() const;
  void count_tokens(const Routing& routing) noexcept;

  struct Submitted {
    std::shared_ptr<LayerJob> job;
    std::shared_ptr<Deferred> deferred;  // null where none are
  };
  // Queues the sum over top-k of weight * expert(x) for each row, but that of what
  // mark_deferred chooses is queued behind it as what the call leaves. Has read the
  // inputs when it returns, many rows of x with the workers' help. Throws std::invalid_argument for
  // a bad expert id.
  Submitted submit(const CallInputs& inputs, CallOutput output, int64_t num_deferred);
  // The first of two steps, the other is LayerJob::submit, for inputs that stay until the job has
  // ended: they are not copied, and a bad id is left out, which the job's bad_id() tells. Between
  // the steps somebody else may get to know the job, and abandon it where it has to wait for its
  // turn.
  std::shared_ptr<LayerJob> make_job(const CallInputs& inputs, const Slots& slots,
                                     CallOutput output);
  // The same for slots whose sum is left to the next layer.
  std::shared_ptr<Deferred> make_deferred(const CallInputs& inputs, const Slots& slots);
  // The workers' CPUs, group after group.
  const std::vector<std::vector<int>>& worker_cpus() const { return engine_->pool.cpus(); }
  // As WorkerPool::abandon.
  bool abandon(Job& job, const std::string& reason) { return engine_->pool.abandon(job, reason); }

  // Bytes of x, and of the output. Throws std::invalid_argument for a number of tokens that no call
  // can have.
  size_t row_bytes(ActivationDtype dtype) const;
  size_t output_bytes(ActivationDtype dtype, int64_t tokens) const;

 private:
  // Before and after the weights are written.
  void prepare(const int8_t* tables, const std::vector<int64_t>& source);
  void finish(const std::vector<int64_t>& source);
  int num_slices() const { return static_cast<int>(slices_.size()); }

  const LayerConfig config_;
  const std::shared_ptr<Engine> engine_;
  std::shared_ptr<const ExpertMask> on_gpu_;
  std::vector<Slice> slices_;
  std::vector<std::atomic<int64_t>> token_counts_;
  Buffer tables_;  // as the target wants them
  int64_t weight_bytes_ = 0;
  bool loaded_ = false;
};

}  // namespace kt
