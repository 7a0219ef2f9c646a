// Reading a large file with many threads, past the page cache's own guesses.
#pragma once

#include <cstdint>
#include <string>

namespace kt {

// Throws std::runtime_error, with the path, for whatever the system refuses.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Throws if the file does not hold this range: offsets come from a header that may be damaged.
  void check_range(int64_t offset, int64_t bytes) const;

  void read_at(int64_t offset, int64_t bytes, uint8_t* out) const;

  // Starts to fetch a range into the page cache. Drops it from there, but for pages that it shares
  // with its neighbours; `bytes` 0 means to the end.
  void fetch(int64_t offset, int64_t bytes) const;
  void drop(int64_t offset, int64_t bytes) const;

 private:
  const std::string path_;
  const int fd_;
};

// Reads runs of ascending offsets, with the disk kept busy ahead of them.
class ReaderAhead {
 public:
  explicit ReaderAhead(const File& file) : file_(file) {}
  void read_at(int64_t offset, int64_t bytes, uint8_t* out);

 private:
  const File& file_;
  int64_t fetched_ = 0;
};

}  // namespace kt
