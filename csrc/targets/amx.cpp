// AMX for groups of tokens, the AVX-512 VNNI kernels for few.
#define KT_TARGET_NAMESPACE amx
#include "isa/amx.h"

#include "expert/expert_tiles-inl.h"
#include "gemm/quantize_activations-inl.h"
#include "targets/kernels.h"
#include "weights/quantize_weights-inl.h"

namespace kt::amx {

#define KT_ROW(method, name, bits, block_k) {gate_up_tiles<block_k>, down_tiles<block_k>},
extern const Kernels kernels;
const Kernels kernels = {
    .name = "amx",
    .activation_bytes = 1,
    .workspace_bytes = sizeof(TileWorkspace) > sizeof(PanelWorkspace) ? sizeof(TileWorkspace)
                                                                      : sizeof(PanelWorkspace),
    .prepare_tables = prepare_tables,
    .quantize_f32 = quantize_row<float>,
    .quantize_bf16 = quantize_row<uint16_t>,
    .expert = {KT_METHODS(KT_ROW)},
    .store_bf16 = store_bf16,
    .quantize = kQuantizeKernels,
};
#undef KT_ROW

}  // namespace kt::amx
