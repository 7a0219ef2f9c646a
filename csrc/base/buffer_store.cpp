#include "base/buffer_store.h"

#include <exception>
#include <utility>

namespace kt {
namespace {

// The C library keeps smaller memory by itself, and takes larger fresh from the system every time.
constexpr size_t kLeastKept = size_t{1} << 17;

}  // namespace

struct BufferStore::Loan {
  const std::shared_ptr<BufferStore> store;
  Kept kept;

  explicit Loan(std::shared_ptr<BufferStore> from) : store(std::move(from)) {
    const std::lock_guard lock(store->mutex_);
    // Here, so that giving back cannot fail.
    store->free_.reserve(store->free_.size() + store->lent_ + 1);
    ++store->lent_;
  }
  ~Loan() { store->give(std::move(kept)); }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
};

std::shared_ptr<uint8_t> BufferStore::take(size_t bytes) {
  if (bytes < kLeastKept) {
    auto memory = std::make_shared_for_overwrite<uint8_t[]>(bytes);
    uint8_t* const data = memory.get();
    return {std::move(memory), data};
  }
  auto loan = std::make_shared<Loan>(shared_from_this());
  loan->kept = find(bytes);
  fit(loan->kept, bytes);
  uint8_t* const data = loan->kept.buffer.data();
  return {std::move(loan), data};
}

// Makes it large enough, and pinned where memory is to be.
void BufferStore::fit(Kept& kept, size_t bytes) {
  std::shared_ptr<const Pinning> pinning;
  {
    const std::lock_guard lock(mutex_);
    pinning = pinning_;
  }
  if (kept.buffer.bytes() < bytes && kept.pinned) {
    pinning->unpin(kept.buffer.data());
    kept.pinned = false;
  }
  kept.buffer.reserve(bytes);
  if (!pinning || kept.pinned) return;
  try {
    pinning->pin(kept.buffer.data(), kept.buffer.bytes());
  } catch (const std::exception&) {
    return;  // it would only have saved time
  }
  kept.pinned = true;
}

void BufferStore::use(std::shared_ptr<const Pinning> pinning) {
  const std::lock_guard lock(mutex_);
  if (!pinning_) pinning_ = std::move(pinning);
}

BufferStore::~BufferStore() {
  for (const Kept& kept : free_)
    if (kept.pinned) pinning_->unpin(kept.buffer.data());
}

// The smallest that suffices, or the largest to be replaced: no more buffers than are ever in use
// at once, and none that is too small for long.
BufferStore::Kept BufferStore::find(size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const size_t size = it->buffer.bytes();
    const bool better = best == free_.end() || (best->buffer.bytes() < bytes
                                                    ? size > best->buffer.bytes()
                                                    : size >= bytes && size < best->buffer.bytes());
    if (better) best = it;
  }
  if (best == free_.end()) return {};
  Kept kept = std::move(*best);
  free_.erase(best);
  return kept;
}

void BufferStore::give(Kept kept) noexcept {
  const std::lock_guard lock(mutex_);
  --lent_;
  if (kept.buffer.bytes() > 0) free_.push_back(std::move(kept));
}

}  // namespace kt
