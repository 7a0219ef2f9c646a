// AMX for groups of tokens, the AVX-512 VNNI kernels for few.
#define KT_TARGET_NAMESPACE amx
#include "isa/amx.h"
#include "targets/kernels.h"

#include "weights/quantize-inl.h"
#include "gemm/quantize-inl.h"
#include "gemm/panels-inl.h"
#include "gemm/tiles-inl.h"
#include "expert/activation-inl.h"
#include "expert/expert-inl.h"
#include "expert/expert_tiles-inl.h"

namespace kt::amx {

extern const Kernels kernels;
const Kernels kernels = {
    "amx",
    1,
    sizeof(TileWorkspace) > sizeof(PanelWorkspace) ? sizeof(TileWorkspace) : sizeof(PanelWorkspace),
    prepare_tables,
    quantize_row<float>,
    quantize_row<uint16_t>,
    {gate_up_tiles<16>, gate_up_tiles<8>, gate_up_tiles<0>},
    {down_tiles<16>, down_tiles<8>, down_tiles<0>},
    store_bf16,
    kQuantizeKernels,
};

}  // namespace kt::amx
