// One register function for each topic; kt_kernel/_ext.pyi states the Python signatures.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

void bind_machine(pybind11::module_& module);  // targets, CPU features, topology
void bind_weights(pybind11::module_& module);  // packing one projection
void bind_layer(pybind11::module_& module);    // engine, layer, job
void bind_stream(pybind11::module_& module);   // a layer's calls on a CUDA stream

}  // namespace kt
