#include "stream/memory_ops.h"

#include "base/error.h"

namespace kt {

void MemoryOps::check(CudaError error, const char* what) const {
  if (error == 0) return;
  const char* name = nullptr;
  error_name(error, &name);
  fail_runtime(what, " failed: ", name == nullptr ? "unknown error" : name, " (", error, ")");
}

MemoryOps find_memory_ops(const CudaRuntime& runtime, const std::string& driver) {
  const LoadedLibrary cudart = runtime.library, cuda("CUDA driver", driver);
  MemoryOps ops;
  // The first versions of these were off unless a module parameter of the driver said otherwise.
  cuda.resolve(ops.batch, "cuStreamBatchMemOp_v2");
  cuda.resolve(ops.capture_info, "cuStreamGetCaptureInfo_v2");
  cuda.resolve(ops.error_name, "cuGetErrorName");
  cudart.resolve(ops.device_pointer, "cudaHostGetDevicePointer");
  cudart.resolve(ops.create_stream, "cudaStreamCreateWithFlags");
  cudart.resolve(ops.destroy_stream, "cudaStreamDestroy");
  cudart.resolve(ops.query_stream, "cudaStreamQuery");
  cudart.resolve(ops.begin_capture, "cudaStreamBeginCapture");
  cudart.resolve(ops.end_capture, "cudaStreamEndCapture");
  cudart.resolve(ops.instantiate, "cudaGraphInstantiateWithFlags");
  cudart.resolve(ops.launch, "cudaGraphLaunch");
  cudart.resolve(ops.destroy_executable, "cudaGraphExecDestroy");
  cudart.resolve(ops.destroy_graph, "cudaGraphDestroy");
  return ops;
}

}  // namespace kt
