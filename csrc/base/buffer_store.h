// Memory that is lent, used again by others, and whole as long as anyone holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/buffer.h"

namespace kt {

// Fresh memory would cost a page fault for every 4 KiB of every call. What is lent goes back when
// its last holder is gone, on whatever thread that is, and needs no engine for that.
// What makes memory known to a device, which then copies from it by itself, and takes that back
// before the memory goes.
struct Pinning {
  std::function<void(uint8_t* memory, size_t bytes)> pin;  // may throw: the memory is used as it is
  std::function<void(uint8_t* memory)> unpin;              // must not throw
};

class BufferStore : public std::enable_shared_from_this<BufferStore> {
 public:
  // At least `bytes`, with the contents of an earlier use.
  std::shared_ptr<uint8_t> take(size_t bytes);

  // From now on memory is pinned, but for small pieces. Once; later calls change nothing.
  void use(std::shared_ptr<const Pinning> pinning);

  ~BufferStore();

 private:
  struct Loan;
  struct Kept {
    Buffer buffer;
    bool pinned = false;
  };
  Kept find(size_t bytes);
  void give(Kept kept) noexcept;
  void fit(Kept& kept, size_t bytes);

  std::mutex mutex_;
  std::vector<Kept> free_;
  std::shared_ptr<const Pinning> pinning_;
  size_t lent_ = 0;
};

}  // namespace kt
