// What a target (one ISA) implements: a table of functions over ranges. Plain data and <cstdint>
// only, because target files are compiled for their ISA and must not instantiate anything that the
// linker could pick for the rest of the program.
#pragma once

#include <cstdint>

#include "expert/tasks.h"
#include "weights/layout.h"
#include "weights/quantize_kernels.h"

namespace kt {

struct ExpertKernels {
  void (*gate_up)(const GateUpTask&);
  void (*down)(const DownTask&);
};

struct Kernels {
  const char* name;
  int activation_bytes;     // bytes of one quantised activation: 1, or 4 in the reference target
  int64_t workspace_bytes;  // of one worker, a multiple of 64
  void (*prepare_tables)(const int8_t* tables, uint8_t* prepared);  // both [256][16]
  // q has room for k activations and the tail.
  void (*quantize_f32)(const float* x, int64_t k, uint8_t* q, RowScale* scale);
  void (*quantize_bf16)(const uint16_t* x, int64_t k, uint8_t* q, RowScale* scale);
  ExpertKernels expert[kNumMethods];                             // by Method
  void (*store_bf16)(const float* x, int64_t n, uint16_t* out);  // round to nearest even
  QuantizeKernels quantize;
};

}  // namespace kt
