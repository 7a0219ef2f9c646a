// Memory that is lent, used again by others, and whole as long as anyone holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/buffer.h"

namespace kt {

// Fresh memory would cost a page fault for every 4 KiB of every call. What is lent goes back when
// its last holder is gone, on whatever thread that is, and needs no engine for that.
class BufferStore : public std::enable_shared_from_this<BufferStore> {
 public:
  // At least `bytes`, with the contents of an earlier use.
  std::shared_ptr<uint8_t> take(size_t bytes);

 private:
  struct Loan;
  Buffer find(size_t bytes);
  void give(Buffer buffer) noexcept;

  std::mutex mutex_;
  std::vector<Buffer> free_;
  size_t lent_ = 0;
};

}  // namespace kt
