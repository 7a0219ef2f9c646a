#include "stream/staging.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "threads/affinity.h"

namespace kt {

Staging::Staging(const CudaRuntime& runtime, const Sizes& sizes, const std::vector<int>& cpus)
    : runtime_(runtime), buffer_bytes_(sizes.buffer_bytes) {
  if (cpus.empty()) fail_argument("staging buffers need at least one CPU");
  for (const int cpu : cpus) check_cpu(cpu);
  if (sizes.threads < 1 || sizes.threads > kMostThreads)
    fail_argument("threads is ", sizes.threads, ": expected 1 to ", kMostThreads);
  if (sizes.buffers < 1 || sizes.buffers > kMostBuffers)
    fail_argument("buffers is ", sizes.buffers, ": expected 1 to ", kMostBuffers);
  if (buffer_bytes_ < 1 || buffer_bytes_ > kMostBytes)
    fail_argument("buffer_bytes is ", buffer_bytes_, ": expected 1 to ", kMostBytes);
  void* memory = nullptr;
  runtime_.check(
      runtime_.host_alloc(&memory, static_cast<size_t>(sizes.buffers) * buffer_bytes_, 0),
      "cudaHostAlloc");
  for (int i = 0; i < sizes.buffers; ++i)
    shared_->buffers.push_back(
        {static_cast<uint8_t*>(memory) + static_cast<size_t>(i) * buffer_bytes_, i});
  threads_.reserve(static_cast<size_t>(sizes.threads));
  for (int i = 0; i < sizes.threads; ++i) {
    try {
      threads_.emplace_back([shared = shared_] { fill(*shared); });
    } catch (const std::system_error& error) {
      stop();
      fail_runtime("cannot start a thread that copies experts: ", error.what(),
                   "; raise the limit on processes");
    }
    pthread_setname_np(threads_.back().native_handle(), concat("kt-copy-", i).c_str());
    pin(threads_.back(), cpus);
  }
}

Staging::~Staging() { stop(); }

void Staging::stop() {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->changed.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Staging::Shared::give_back(int64_t piece) {
  buffer(piece).turn = piece + static_cast<int64_t>(buffers.size());
}

// A thread takes the pieces in their order, each when it is its turn in its buffer.
void Staging::fill(Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (true) {
    shared.changed.wait(lock, [&] {
      if (shared.stopping) return true;
      if (shared.waiting.empty()) return false;
      const int64_t next = shared.waiting.front().number;
      return shared.buffer(next).turn == next;
    });
    if (shared.stopping) return;
    const Piece piece = shared.waiting.front();
    shared.waiting.pop_front();
    Buffer& buffer = shared.buffer(piece.number);
    if (piece.from != nullptr) {
      buffer.filling = true;
      lock.unlock();
      std::memcpy(buffer.memory, piece.from, piece.bytes);
      lock.lock();
      buffer.filling = false;
    }
    buffer.filled = piece.number;
    if (piece.given_up) shared.give_back(piece.number);
    shared.changed.notify_all();
  }
}

// A host function: the device has fetched the piece before, and fetches this one next.
void Staging::arrive(void* data) {
  const std::unique_ptr<Arrival> arrival(static_cast<Arrival*>(data));
  Shared& shared = *arrival->shared;
  std::unique_lock lock(shared.mutex);
  if (arrival->before != kNone) {
    shared.give_back(arrival->before);
    shared.changed.notify_all();
  }
  const Buffer& buffer = shared.buffer(arrival->piece);
  shared.changed.wait(lock, [&] {
    // A thread that ends writes to the end, and the device must not read beside it.
    return buffer.filled >= arrival->piece || (shared.stopping && !buffer.filling);
  });
}

int64_t Staging::add(const uint8_t* from, size_t bytes) {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->waiting.push_back({next_, from, bytes});
  }
  shared_->changed.notify_all();
  return next_++;
}

// From this piece on, none is read any more when this returns. Those that are on the stream arrive
// with whatever is in their buffers; `given_up` is not there, and so gives its buffer back.
void Staging::withdraw(int64_t first, int64_t given_up) {
  {
    std::unique_lock lock(shared_->mutex);
    for (Piece& piece : shared_->waiting)
      if (piece.number >= first) piece.from = nullptr;
    const std::vector<Buffer>& buffers = shared_->buffers;
    shared_->changed.wait(lock, [&] {
      return std::none_of(buffers.begin(), buffers.end(), [&](const Buffer& buffer) {
        return buffer.filling && buffer.turn >= first;
      });
    });
    if (given_up != kNone) {
      if (shared_->buffer(given_up).filled == given_up)
        shared_->give_back(given_up);
      else
        shared_->waiting.back().given_up = true;
    }
  }
  shared_->changed.notify_all();
}

void Staging::copy(const uint8_t* from, uint8_t* to, size_t bytes, CudaStream stream) {
  const std::lock_guard one_at_a_time(calls_);
  const int64_t first = next_;
  int64_t piece = kNone;  // one that is not on the stream
  try {
    for (size_t at = 0; at < bytes; at += buffer_bytes_) {
      const size_t size = std::min(buffer_bytes_, bytes - at);
      auto arrival = std::make_unique<Arrival>(Arrival{shared_, before_, next_});
      piece = add(from + at, size);
      runtime_.check(runtime_.launch_host_func(stream, arrive, arrival.get()),
                     "cudaLaunchHostFunc");
      static_cast<void>(arrival.release());  // the host function deletes it
      before_ = kNone;
      runtime_.check(runtime_.memcpy_async(to + at, shared_->buffer(piece).memory, size,
                                           kHostToDevice, stream),
                     "cudaMemcpyAsync to the device");
      before_ = std::exchange(piece, kNone);
    }
  } catch (...) {
    withdraw(first, piece);
    throw;
  }
}

}  // namespace kt
