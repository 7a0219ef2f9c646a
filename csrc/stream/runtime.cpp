#include "stream/runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "base/error.h"

namespace kt {

void CudaRuntime::check(CudaError error, const char* what) const {
  if (error == 0) return;
  last_error();
  fail_runtime(what, " failed: ", error_string(error), " (CUDA error ", error, ")");
}

void CudaRuntime::register_memory(void* memory, size_t bytes) const {
  const CudaError error = host_register(memory, bytes, 0);
  if (error == kAlreadyRegistered) {
    last_error();
    return;
  }
  check(error, "cudaHostRegister");
}

CudaRuntime find_cuda_runtime(const std::string& library) {
  // No name would be this program.
  void* const handle = library.empty() ? nullptr : dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) fail_runtime("the CUDA runtime ", library, " is not loaded");
  const auto resolve = [&](auto& function, const char* name) {
    void* const found = dlsym(handle, name);
    if (found == nullptr) fail_runtime("the CUDA runtime ", library, " has no ", name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
  CudaRuntime runtime;
  resolve(runtime.memcpy_async, "cudaMemcpyAsync");
  resolve(runtime.launch_host_func, "cudaLaunchHostFunc");
  resolve(runtime.host_alloc, "cudaHostAlloc");
  resolve(runtime.host_register, "cudaHostRegister");
  resolve(runtime.host_unregister, "cudaHostUnregister");
  resolve(runtime.is_capturing, "cudaStreamIsCapturing");
  resolve(runtime.exchange_capture_mode, "cudaThreadExchangeStreamCaptureMode");
  resolve(runtime.error_string, "cudaGetErrorString");
  resolve(runtime.last_error, "cudaGetLastError");
  return runtime;  // the handle stays open: the library must not go
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
