// A target whose activations are int8: everything above its ISA header, and its table.
// A target file defines KT_TARGET_NAMESPACE, includes its ISA header, then this.
#pragma once

#include "expert/expert-inl.h"
#include "gemm/quantize_activations-inl.h"
#include "targets/kernels.h"
#include "weights/quantize_weights-inl.h"

#define KT_STRING(x) #x
#define KT_NAME(x) KT_STRING(x)

namespace kt::KT_TARGET_NAMESPACE {

#define KT_ROW(method, name, bits, block_k) {gate_up<block_k>, down<block_k>},
extern const Kernels kernels;
const Kernels kernels = {
    .name = KT_NAME(KT_TARGET_NAMESPACE),
    .activation_bytes = 1,
    .workspace_bytes = sizeof(PanelWorkspace),
    .prepare_tables = prepare_tables,
    .quantize_f32 = quantize_row<float>,
    .quantize_bf16 = quantize_row<uint16_t>,
    .expert = {KT_METHODS(KT_ROW)},
    .store_bf16 = store_bf16,
    .quantize = kQuantizeKernels,
};
#undef KT_ROW

}  // namespace kt::KT_TARGET_NAMESPACE
