// What this CPU and this kernel let us run: CPUID for the instructions, XCR0 for the registers that
// the operating system saves.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace kt {

struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool avx512 = false;       // F, BW, VL, DQ and the OS saves zmm
  bool avx512_vnni = false;  // the above and VNNI
  bool avx512_bf16 = false;
  bool amx_tile = false;  // reported by the CPU
  bool amx_int8 = false;
  bool amx_bf16 = false;
  bool amx_permitted = false;  // the kernel granted tile data to this process
  std::string brand;
};

const CpuFeatures& cpu_features();

// (name, present) in a fixed order, for people to read.
std::vector<std::pair<std::string, bool>> list_features();

}  // namespace kt
