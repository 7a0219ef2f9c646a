// One MoE layer's routed experts: weights in memory, and the call.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "moe/engine.h"
#include "moe/slice.h"

namespace kt {

enum class ActivationDtype : uint8_t { kFp32, kBf16 };

// Byte offsets in a packed file of the three stacked tensors of one projection, by Part.
using FileOffsets = std::array<int64_t, 3>;

class LayerJob;

class Layer {
 public:
  // The intermediate size is cut into as many slices as the engine has, in multiples of
  // kDimMultiple; into fewer where it is too small for that.
  Layer(LayerConfig config, std::shared_ptr<Engine> engine);
  ~Layer();  // waits for its calls

  const LayerConfig& config() const { return config_; }
  const std::vector<Slice>& slices() const { return slices_; }
  const uint8_t* tables() const { return tables_.data(); }
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

  // Queues out = sum over top-k of weight * expert(x) for `tokens` rows. Has read x, ids and
  // weights when it returns, many rows of x with the workers' help; `out` [tokens, hidden] must
  // stay until the job has been waited for. x and out are of `dtype`. Throws std::invalid_argument
  // for a bad expert id.
  std::shared_ptr<Job> submit(const void* x, ActivationDtype dtype, int64_t tokens,
                              const int32_t* ids, const float* weights, const uint8_t* on_gpu,
                              void* out);
  // The same for inputs that stay until the job has ended: nothing is waited for.
  std::shared_ptr<LayerJob> submit_kept(const void* x, ActivationDtype dtype, int64_t tokens,
                                        const int32_t* ids, const float* weights,
                                        const uint8_t* on_gpu, void* out);

 private:
  // Before and after the weights are written.
  void prepare(const int8_t* tables, const std::vector<int64_t>& source);
  void finish(const std::vector<int64_t>& source);
  int num_slices() const { return static_cast<int>(slices_.size()); }

  const LayerConfig config_;
  const std::shared_ptr<Engine> engine_;
  std::vector<Slice> slices_;
  Buffer tables_;  // as the target wants them
  int64_t weight_bytes_ = 0;
  bool loaded_ = false;
};

}  // namespace kt
