#include "base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace kt {
namespace {

constexpr int64_t kFetch = 128 << 10;  // what Linux reads ahead at most, by default
constexpr int64_t kAhead = 4 * kFetch;

}  // namespace

File::File(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) fail_runtime("cannot open ", path_, ": ", std::strerror(errno));
  // Many threads read in many places: what lies ahead is asked for explicitly.
  posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
}

File::~File() { close(fd_); }

void File::check_range(int64_t offset, int64_t bytes) const {
  struct stat status;
  if (fstat(fd_, &status) != 0) fail_runtime("cannot read ", path_, ": ", std::strerror(errno));
  if (offset < 0 || bytes > status.st_size || offset > status.st_size - bytes)
    fail_runtime(path_, " ends before byte ", offset, " + ", bytes, ": it is truncated");
}

void File::read_at(int64_t offset, int64_t bytes, uint8_t* out) const {
  while (bytes > 0) {
    const ssize_t got = pread(fd_, out, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_runtime("cannot read ", path_, ": ", std::strerror(errno));
    if (got == 0) fail_runtime(path_, " ends before byte ", offset + bytes, ": it is truncated");
    out += got;
    offset += got;
    bytes -= got;
  }
}

void File::fetch(int64_t offset, int64_t bytes) const {
  posix_fadvise(fd_, offset, bytes, POSIX_FADV_WILLNEED);
}

void File::drop(int64_t offset, int64_t bytes) const {
  posix_fadvise(fd_, offset, bytes, POSIX_FADV_DONTNEED);
}

void ReaderAhead::read_at(int64_t offset, int64_t bytes, uint8_t* out) {
  for (fetched_ = std::max(fetched_, offset); fetched_ < offset + bytes + kAhead;
       fetched_ += kFetch)
    file_.fetch(fetched_, kFetch);
  file_.read_at(offset, bytes, out);
}

}  // namespace kt
