// Copies to a device out of memory that it cannot read by itself. Threads of this process copy it
// into a few pinned buffers, piece by piece, and the device fetches it from there. The stream is
// given everything at once and nothing is waited for; of each piece
//
//   a host function that gives the buffer of the piece before back, and waits until this one's is
//   full | the buffer to the device
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stream/runtime.h"

namespace kt {

class Staging {
 public:
  static constexpr int kMostThreads = 64, kMostBuffers = 1024;
  static constexpr size_t kMostBytes = size_t{1} << 30;  // of a buffer

  struct Sizes {
    int threads = 0;
    int buffers = 0;
    size_t buffer_bytes = 0;
  };

  // The buffers stay until the process ends: CUDA frees none in a host function. The threads run on
  // these CPUs. Throws std::invalid_argument, or std::runtime_error for what the system or CUDA
  // refuses.
  Staging(const CudaRuntime& runtime, const Sizes& sizes, const std::vector<int>& cpus);
  // What is on its way then arrives damaged.
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Puts a copy on a stream, the same for all calls or one after whose end another begins. `from`
  // must stay as it is until the stream is through with it. Throws std::runtime_error for what CUDA
  // refuses: no thread reads `from` any more then, what arrives of the copy is of no use, and the
  // next one is whole.
  void copy(const uint8_t* from, uint8_t* to, size_t bytes, CudaStream stream);

 private:
  static constexpr int64_t kNone = -1;
  struct Piece {
    int64_t number;       // its buffer is that of number % buffers
    const uint8_t* from;  // null once withdrawn: the buffer counts as filled
    size_t bytes;
    bool given_up = false;  // nobody else gives its buffer back
  };
  struct Buffer {
    uint8_t* memory;
    int64_t turn;  // the piece that may fill it, or is in it
    int64_t filled = kNone;
    bool filling = false;
  };
  // What threads and host functions share.
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Buffer> buffers;
    std::deque<Piece> waiting;
    bool stopping = false;

    Buffer& buffer(int64_t piece) { return buffers[static_cast<size_t>(piece) % buffers.size()]; }
    void give_back(int64_t piece);  // with the mutex held
  };
  struct Arrival {
    std::shared_ptr<Shared> shared;
    int64_t before;  // kNone if its buffer has been given back
    int64_t piece;
  };

  static void fill(Shared& shared);
  static void arrive(void* arrival);
  int64_t add(const uint8_t* from, size_t bytes);
  void withdraw(int64_t first, int64_t given_up);
  void stop();

  const CudaRuntime runtime_;
  const size_t buffer_bytes_;
  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  std::vector<std::thread> threads_;
  std::mutex calls_;
  int64_t next_ = 0;
  int64_t before_ = kNone;  // the piece whose buffer the next host function gives back
};

}  // namespace kt
