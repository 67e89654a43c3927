// The table of this instruction set's kernels.
#include "cpu/isa_ops.h"
#include "cpu/simd.h"

namespace EVIT_KERNELS {

extern const Kernels kKernels;
const Kernels kKernels = {
    EVIT_STRING(EVIT_ISA),
    stem_scratch,
    dw_ffn_scratch,
    cga_scratch,
    patch_merge_scratch,
    classifier_scratch,
    stem,
    dw_ffn,
    cga,
    patch_merge,
    classifier,
};

}  // namespace EVIT_KERNELS
