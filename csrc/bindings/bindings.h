// One register function for each topic; kt_kernel/_ext.pyi states the Python signatures.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

// Gives the GIL away. Python to 3.13 ends a thread that asks for it back when the interpreter has
// ended: it unwinds the stack, which the destructor of pybind11's own class does not allow, and so
// the process would abort when it ends while a thread waits for a call.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  // NOLINTNEXTLINE(bugprone-unsafe-to-allow-exceptions)
  ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

void bind_machine(pybind11::module_& module);  // targets, CPU features
void bind_weights(pybind11::module_& module);  // packing one projection
void bind_layer(pybind11::module_& module);    // engine, layer, job
void bind_stream(pybind11::module_& module);   // a layer's calls on a CUDA stream

}  // namespace kt
