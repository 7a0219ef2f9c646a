#include "base/buffer_store.h"

#include <utility>

namespace kt {
namespace {

// The C library keeps smaller memory by itself, and takes larger fresh from the system every time.
constexpr size_t kLeastKept = size_t{1} << 17;

}  // namespace

struct BufferStore::Loan {
  const std::shared_ptr<BufferStore> store;
  Buffer buffer;

  explicit Loan(std::shared_ptr<BufferStore> from) : store(std::move(from)) {
    const std::lock_guard lock(store->mutex_);
    // Here, so that giving back cannot fail.
    store->free_.reserve(store->free_.size() + store->lent_ + 1);
    ++store->lent_;
  }
  ~Loan() { store->give(std::move(buffer)); }
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
  loan->buffer = find(bytes);
  loan->buffer.reserve(bytes);
  uint8_t* const data = loan->buffer.data();
  return {std::move(loan), data};
}

// The smallest that suffices, or the largest to be replaced: no more buffers than are ever in use
// at once, and none that is too small for long.
Buffer BufferStore::find(size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const bool better =
        best == free_.end() ||
        (best->bytes() < bytes ? it->bytes() > best->bytes()
                               : it->bytes() >= bytes && it->bytes() < best->bytes());
    if (better) best = it;
  }
  if (best == free_.end()) return {};
  Buffer buffer = std::move(*best);
  free_.erase(best);
  return buffer;
}

void BufferStore::give(Buffer buffer) noexcept {
  const std::lock_guard lock(mutex_);
  --lent_;
  if (buffer.bytes() > 0) free_.push_back(std::move(buffer));
}

}  // namespace kt
