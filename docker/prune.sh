#!/bin/sh
# prune.sh SITE_PACKAGES: delete what the packages bring and nothing here loads, 0.6 GB in all.
# SGLang's own files stay as they are.
set -eu
cd "$1"
# Archives to link against NVIDIA's profiler; Triton loads its shared library.
rm -f triton/backends/nvidia/lib/cupti*/*.a
# The CUDA 12 half of a compiler that takes the newest that it finds; torch here is CUDA 13's.
rm -rf nvidia_cutlass_dsl/cu12
rm -f nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir*cu12*
# The dense solver over several GPUs; no library links to it.
rm -f nvidia/cu13/lib/libcusolverMg.so.*
# Tests of the large Python libraries.
find pandas pyarrow scipy -type d -name tests -prune -exec rm -rf {} +
