// A target whose activations are int8: everything above its ISA header, and its table.
// A target file defines KT_TARGET_NAMESPACE, includes its ISA header, then this.

#include "targets/kernels.h"

#include "weights/quantize-inl.h"
#include "gemm/quantize-inl.h"
#include "gemm/panels-inl.h"
#include "expert/activation-inl.h"
#include "expert/expert-inl.h"

#define KT_STRING(x) #x
#define KT_NAME(x) KT_STRING(x)

namespace kt::KT_TARGET_NAMESPACE {

extern const Kernels kernels;
const Kernels kernels = {
    KT_NAME(KT_TARGET_NAMESPACE),
    1,
    sizeof(PanelWorkspace),
    prepare_tables,
    quantize_row<float>,
    quantize_row<uint16_t>,
    {gate_up<16>, gate_up<8>, gate_up<0>},
    {down<16>, down<8>, down<0>},
    store_bf16,
    kQuantizeKernels,
};

}  // namespace kt::KT_TARGET_NAMESPACE
