// Cache-line-aligned memory that asks for huge pages: expert weights are hundreds of megabytes per
// layer and 4 KiB pages would cost a TLB miss per panel.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/error.h"

namespace kt {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { reserve(bytes); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  // Grows to at least `bytes`; the contents are lost when it grows. Pages are touched by whoever
  // writes them first, which is what places them on that thread's NUMA node.
  void reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    if (bytes > SIZE_MAX / 4) fail_runtime("out of memory: ", bytes, " bytes were asked for");
    Buffer fresh;
    // A small buffer gains nothing from a huge page, and zeroing one costs more than its use.
    const size_t page = bytes < 2 * kHugePage ? kSmallPage : kHugePage;
    const size_t rounded = (bytes + page - 1) / page * page;
    // The system aligns to small pages: a huge page more leaves room for a start on one.
    const size_t slack = page == kHugePage ? kHugePage : 0;
    void* mapped =
        mmap(nullptr, rounded + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail_runtime("out of memory: ", rounded, " bytes were refused");
    auto* memory = static_cast<uint8_t*>(mapped);
    if (slack > 0) {
      const size_t before = -reinterpret_cast<uintptr_t>(memory) % kHugePage;
      if (before > 0) munmap(memory, before);
      memory += before;
      if (slack > before) munmap(memory + rounded, slack - before);
      // Advice only: a refusal costs speed, not results.
      madvise(memory, rounded, MADV_HUGEPAGE);
    }
    fresh.data_ = memory;
    fresh.bytes_ = rounded;
    swap(fresh);
  }

  static constexpr size_t kSmallPage = size_t{4} << 10;
  static constexpr size_t kHugePage = size_t{2} << 20;

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  size_t bytes() const { return bytes_; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kt
