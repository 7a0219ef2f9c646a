// The few calls of the CUDA runtime that hand a layer's work to the CPU and back, found at run time
// in the library that torch has loaded: nothing of CUDA is needed to build.
#pragma once

#include <cstddef>
#include <string>
#include <type_traits>

namespace kt {

// As in CUDA's driver_types.h.
using CudaStream = void*;
using CudaError = int;  // 0 is success
constexpr int kHostToDevice = 1, kDeviceToHost = 2;
constexpr int kCaptureNone = 0, kCaptureActive = 1;
constexpr int kCaptureModeRelaxed = 2;

// A library that this process has loaded already, and that stays.
class LoadedLibrary {
 public:
  LoadedLibrary() = default;  // none, in which nothing is found
  // `what` it is, and its file name or path. Throws std::runtime_error if it is not loaded.
  LoadedLibrary(std::string what, std::string name);

  // Throws std::runtime_error if there is no such function.
  template <class F>
  void resolve(F*& function, const char* name) const {
    static_assert(std::is_function_v<F>);
    function = reinterpret_cast<F*>(find(name));
  }

 private:
  void* find(const char* name) const;

  std::string what_, name_;
  void* handle_ = nullptr;
};

struct CudaRuntime {
  CudaRuntime() = default;
  explicit CudaRuntime(const LoadedLibrary& loaded);

  LoadedLibrary library;
  CudaError (*memcpy_async)(void* to, const void* from, size_t bytes, int kind, CudaStream stream);
  CudaError (*launch_host_func)(CudaStream stream, void (*function)(void*), void* data);
  CudaError (*host_alloc)(void** memory, size_t bytes, unsigned flags);
  CudaError (*host_register)(void* memory, size_t bytes, unsigned flags);
  CudaError (*host_unregister)(void* memory);
  CudaError (*is_capturing)(CudaStream stream, int* status);
  CudaError (*exchange_capture_mode)(int* mode);  // of this thread
  const char* (*error_string)(CudaError error);
  CudaError (*last_error)();  // and forgets it

  // Throws std::runtime_error that names `what` for anything but success. The runtime forgets the
  // error: whoever asks for the last one next would take it for theirs.
  void check(CudaError error, const char* what) const;

  // Lets devices read this memory by themselves. It must be unregistered before it is freed: CUDA
  // would take what is mapped there next for registered, and devices would read the old pages.
  //
  // Memory that is registered already, all or a part of it, is refused like any other. It is either
  // registered by somebody else, who may end that at any time, or was freed without being
  // unregistered. No two callers share a page: they register whole mappings, or experts of a slice
  // with at least one expert, which is larger than a page, between them.
  //
  // Both throw as check does.
  void register_memory(void* memory, size_t bytes) const;
  // From its first byte, as it was registered; legal while streams are captured. What copies from
  // or to it must have ended.
  void unregister_memory(void* memory) const;
  // The same for memory that goes, whatever CUDA says.
  void forget_memory(void* memory) const noexcept;
};

// Lets this thread allocate, or work on another stream, while some stream is being captured: what
// it does is no part of the capture.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaRuntime& runtime) : runtime_(runtime) {
    runtime_.check(runtime_.exchange_capture_mode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { runtime_.exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const CudaRuntime& runtime_;
  int mode_ = kCaptureModeRelaxed;  // then the one before
};

// The runtime in a library that this process has loaded already; `library` is its file name or
// path. Throws std::runtime_error if it is not loaded or lacks a call.
CudaRuntime find_cuda_runtime(const std::string& library);

// Without a device: memory is this process's, and what a stream is given happens at once. It has
// the calls that Staging makes and no others.
CudaRuntime direct_runtime();

}  // namespace kt
