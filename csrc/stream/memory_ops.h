// Memory operations of the CUDA driver: a stream writes a word of the host's memory, or waits for
// one. Graphs capture them (CUDA 11.7 and later). With what proves that they work here, found in
// the libraries that torch has loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "stream/runtime.h"

namespace kt {

// As CUstreamBatchMemOpParams in CUDA's cuda.h, whose members for waiting and writing are alike.
struct MemoryOp {
  enum Kind : uint32_t { kWait = 1, kWrite = 2 };
  uint32_t kind;
  uint64_t address;  // on the device
  uint64_t value;    // 32 bits of it count
  uint32_t flags;
  uint64_t internal[2];
};
static_assert(sizeof(MemoryOp) == 48);
constexpr uint32_t kWaitUntilEqual = 1;

constexpr CudaError kNotReady = 600;

struct MemoryOps {
  // Of the driver.
  CudaError (*batch)(CudaStream stream, unsigned count, MemoryOp* ops, unsigned flags);
  CudaError (*capture_info)(CudaStream stream, int* status, uint64_t* id, void** graph,
                            void** dependencies, size_t* count);
  CudaError (*error_name)(CudaError error, const char** name);
  // Of the runtime.
  CudaError (*device_pointer)(void** device, void* host, unsigned flags);
  CudaError (*create_stream)(CudaStream* stream, unsigned flags);
  CudaError (*destroy_stream)(CudaStream stream);
  CudaError (*query_stream)(CudaStream stream);
  CudaError (*begin_capture)(CudaStream stream, int mode);
  CudaError (*end_capture)(CudaStream stream, void** graph);
  CudaError (*instantiate)(void** executable, void* graph, unsigned long long flags);
  CudaError (*launch)(void* executable, CudaStream stream);
  CudaError (*destroy_executable)(void* executable);
  CudaError (*destroy_graph)(void* graph);

  // Throws std::runtime_error that names `what` for anything but success, of the driver.
  void check(CudaError error, const char* what) const;
};

// Those of the runtime and of the driver, a library of that name that is loaded already. Throws
// std::runtime_error if it is not, or where one lacks a call.
MemoryOps find_memory_ops(const CudaRuntime& runtime, const std::string& driver);

}  // namespace kt
