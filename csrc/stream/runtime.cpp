#include "stream/runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

#include "base/error.h"

namespace kt {

void CudaRuntime::check(CudaError error, const char* what) const {
  if (error == 0) return;
  last_error();
  fail_runtime(what, " failed: ", error_string(error), " (CUDA error ", error, ")");
}

void CudaRuntime::register_memory(void* memory, size_t bytes) const {
  check(host_register(memory, bytes, 0), "cudaHostRegister");
}

void CudaRuntime::unregister_memory(void* memory) const {
  const RelaxedCapture relaxed(*this);
  check(host_unregister(memory), "cudaHostUnregister");
}

void CudaRuntime::forget_memory(void* memory) const noexcept {
  try {
    unregister_memory(memory);
  } catch (const std::exception&) {
    return;  // CUDA is gone, or broken: what comes next says so
  }
}

LoadedLibrary::LoadedLibrary(std::string what, std::string name)
    : what_(std::move(what)),
      name_(std::move(name)),
      // No name would be this program. The handle stays open: the library must not go.
      handle_(name_.empty() ? nullptr : dlopen(name_.c_str(), RTLD_NOW | RTLD_NOLOAD)) {
  if (handle_ == nullptr) fail_runtime("the ", what_, " ", name_, " is not loaded");
}

void* LoadedLibrary::find(const char* name) const {
  void* const found = handle_ == nullptr ? nullptr : dlsym(handle_, name);
  if (found == nullptr) fail_runtime("the ", what_, " ", name_, " has no ", name);
  return found;
}

CudaRuntime::CudaRuntime(const LoadedLibrary& loaded) : library(loaded) {
  library.resolve(memcpy_async, "cudaMemcpyAsync");
  library.resolve(launch_host_func, "cudaLaunchHostFunc");
  library.resolve(host_alloc, "cudaHostAlloc");
  library.resolve(host_register, "cudaHostRegister");
  library.resolve(host_unregister, "cudaHostUnregister");
  library.resolve(is_capturing, "cudaStreamIsCapturing");
  library.resolve(exchange_capture_mode, "cudaThreadExchangeStreamCaptureMode");
  library.resolve(error_string, "cudaGetErrorString");
  library.resolve(last_error, "cudaGetLastError");
}

CudaRuntime find_cuda_runtime(const std::string& library) {
  return CudaRuntime(LoadedLibrary("CUDA runtime", library));
}

CudaRuntime direct_runtime() {
  constexpr size_t kPage = 4096;
  CudaRuntime runtime{};
  runtime.memcpy_async = [](void* to, const void* from, size_t bytes, int, CudaStream) {
    std::memcpy(to, from, bytes);
    return 0;
  };
  runtime.launch_host_func = [](CudaStream, void (*function)(void*), void* data) {
    function(data);
    return 0;
  };
  runtime.host_alloc = [](void** memory, size_t bytes, unsigned) {
    *memory = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
    return *memory == nullptr ? 1 : 0;
  };
  runtime.error_string = [](CudaError) { return "out of memory"; };
  runtime.last_error = [] { return 0; };
  return runtime;
}

}  // namespace kt
