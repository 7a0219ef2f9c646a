#include "moe/layer.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "moe/layer_job.h"

namespace kt {
namespace {

constexpr int64_t kAlign = 64;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// A one-phase job over independent items, handed out one at a time.
template <class F>
class ParallelFor : public Job {
 public:
  ParallelFor(int64_t items, F f) : items_(items), f_(std::move(f)) {}
  int phases() const override { return 1; }
  void run(int, int, int) override {
    for (int64_t i = next_++; i < items_; i = next_++) f_(i);
  }

 private:
  const int64_t items_;
  const F f_;
  std::atomic<int64_t> next_{0};
};

template <class F>
void parallel_for(WorkerPool& pool, int64_t items, F f) {
  const auto job = std::make_shared<ParallelFor<F>>(items, std::move(f));
  pool.submit(job);
  WorkerPool::wait(*job);
}

class File {
 public:
  explicit File(const std::string& path)
      : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail_runtime("cannot open ", path_, ": ", std::strerror(errno));
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void read_at(int64_t offset, int64_t bytes, uint8_t* out) const {
    while (bytes > 0) {
      const ssize_t got = pread(fd_, out, static_cast<size_t>(bytes), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail_runtime("cannot read ", path_, ": ", std::strerror(errno));
      if (got == 0)
        fail_runtime(path_, " ended at byte ", offset, " with ", bytes, " still expected");
      out += got;
      offset += got;
      bytes -= got;
    }
  }

 private:
  const std::string path_;
  const int fd_;
};

void check_source(const std::vector<int64_t>& source, int64_t num_experts) {
  if (static_cast<int64_t>(source.size()) != num_experts)
    fail_argument("expert map has ", source.size(), " entries, expected ", num_experts);
  for (int64_t expert : source)
    if (expert < -1 || expert >= num_experts)
      fail_argument("expert map names expert ", expert, ", outside [0, ", num_experts, ")");
}

}  // namespace

void Engine::submit(const std::shared_ptr<LayerJob>& job) {
  const std::lock_guard lock(mutex_);
  if (!job->fits_scratch()) {
    pool.drain();
    job->grow_scratch();
  }
  pool.submit(job);
}

Buffer Engine::take_buffer(size_t bytes) {
  Buffer buffer;
  {
    const std::lock_guard lock(mutex_);
    if (!free_buffers_.empty()) {
      buffer = std::move(free_buffers_.back());
      free_buffers_.pop_back();
    }
  }
  buffer.reserve(bytes);
  return buffer;
}

void Engine::give_buffer(Buffer buffer) {
  const std::lock_guard lock(mutex_);
  free_buffers_.push_back(std::move(buffer));
}

Layer::Layer(LayerConfig config, std::shared_ptr<Engine> engine)
    : config_(config), engine_(std::move(engine)) {
  if (config_.num_experts < 1) fail_argument("num_experts is ", config_.num_experts);
  if (config_.top_k < 1 || config_.top_k > config_.num_experts)
    fail_argument("top_k is ", config_.top_k, ": expected 1 to ", config_.num_experts);
  for (const auto& [name, value] : {std::pair{"hidden_size", config_.hidden_size},
                                    std::pair{"intermediate_size", config_.intermediate_size}})
    if (value < kDimMultiple || value % kDimMultiple != 0)
      fail_argument(name, " is ", value, ": expected a positive multiple of ", kDimMultiple);
  for (Projection projection : kProjections) {
    const ProjectionLayout p = layout(projection);
    part_offset_[static_cast<size_t>(projection)] = slot_bytes_;
    slot_bytes_ += align(p.codes_bytes()) + align(p.index_bytes()) + align(p.scales_bytes());
  }
}

Layer::~Layer() { engine_->pool.drain(); }

ProjectionLayout Layer::layout(Projection projection) const {
  if (projection == Projection::kDown)
    return {config_.hidden_size, config_.intermediate_size, config_.method};
  return {config_.intermediate_size, config_.hidden_size, config_.method};
}

uint8_t* Layer::part(int64_t slot, Projection projection) const {
  return weights_.data() + slot * slot_bytes_ + part_offset_[static_cast<size_t>(projection)];
}

PackedProjection Layer::packed(int64_t slot, Projection projection) const {
  const ProjectionLayout p = layout(projection);
  uint8_t* codes = part(slot, projection);
  uint8_t* index = codes + align(p.codes_bytes());
  return {codes, index, reinterpret_cast<uint16_t*>(index + align(p.index_bytes()))};
}

Matrix Layer::matrix(int64_t slot, Projection projection) const {
  const ProjectionLayout p = layout(projection);
  const PackedProjection at = packed(slot, projection);
  return {at.codes, at.table_index, at.scales, p.k, p.codes_per_panel(), p.index_per_panel()};
}

void Layer::load_file(const std::string& path, const std::array<FileOffsets, 3>& offsets,
                      const int8_t* tables, const std::vector<int64_t>& source) {
  check_source(source, config_.num_experts);
  const File file(path);
  weights_.reserve(static_cast<size_t>(config_.num_experts * slot_bytes_));
  if (config_.method == Method::kInt4) {
    tables_.reserve(kNumTables * kTableLevels);
    engine_->kernels.prepare_tables(tables, tables_.data());
  }
  parallel_for(engine_->pool, config_.num_experts * 3, [&](int64_t item) {
    const int64_t slot = item / 3;
    const int64_t expert = source[static_cast<size_t>(slot)];
    if (expert < 0) return;
    const Projection projection = kProjections[static_cast<size_t>(item % 3)];
    const ProjectionLayout p = layout(projection);
    const FileOffsets& from = offsets[static_cast<size_t>(projection)];
    const PackedProjection to = packed(slot, projection);
    file.read_at(from.codes + expert * p.codes_bytes(), p.codes_bytes(), to.codes);
    if (p.index_bytes() > 0)
      file.read_at(from.table_index + expert * p.index_bytes(), p.index_bytes(), to.table_index);
    file.read_at(from.scales + expert * p.scales_bytes(), p.scales_bytes(),
                 reinterpret_cast<uint8_t*>(to.scales));
  });
  loaded_ = true;
}

void Layer::load_matrices(const std::array<SourceMatrix, 3>& stacked,
                          const std::vector<int64_t>& source) {
  check_source(source, config_.num_experts);
  weights_.reserve(static_cast<size_t>(config_.num_experts * slot_bytes_));
  if (config_.method == Method::kInt4) {
    tables_.reserve(kNumTables * kTableLevels);
    engine_->kernels.prepare_tables(&int4_tables()[0][0], tables_.data());
  }
  parallel_for(engine_->pool, config_.num_experts * 3, [&](int64_t item) {
    const int64_t slot = item / 3;
    const int64_t expert = source[static_cast<size_t>(slot)];
    if (expert < 0) return;
    const Projection projection = kProjections[static_cast<size_t>(item % 3)];
    SourceMatrix matrix = stacked[static_cast<size_t>(projection)];
    const int64_t element = matrix.dtype == SourceDtype::kFp32 ? 4 : 2;
    matrix.data = static_cast<const uint8_t*>(matrix.data) + expert * matrix.n * matrix.k * element;
    quantize_projection(matrix, config_.method, packed(slot, projection));
  });
  loaded_ = true;
}

std::shared_ptr<Job> Layer::submit(const void* x, ActivationDtype dtype, int64_t tokens,
                                   const int32_t* ids, const float* weights, const uint8_t* on_gpu,
                                   void* out) {
  if (!loaded_) fail_runtime("the layer has no weights: call load_weights first");
  auto job = std::make_shared<LayerJob>(*this, x, dtype, tokens, ids, weights, on_gpu, out);
  engine_->submit(job);
  return job;
}

}  // namespace kt
