// Declarations of one instruction set's kernels; only instruction-set files include this. A file
// that does is compiled in both forms of stages.h: what it defines outside its anonymous namespace
// belongs into EVIT_KERNELS.
#pragma once

#include "cpu/ops.h"
#include "cpu/stages.h"

// EVIT_STAGE(kQkv): what follows is this stage of the op. A macro, because even an empty function
// in a loop changes where the compiler keeps its variables.
#ifdef EVIT_STAGES
#define EVIT_KERNELS evit::cpu::EVIT_ISA::stages
#define EVIT_STAGE(name) enter_stage(Stage::name)
#else
#define EVIT_KERNELS evit::cpu::EVIT_ISA
#define EVIT_STAGE(name) ((void)0)
#endif

namespace EVIT_KERNELS {

size_t stem_scratch(const StemShape& s, int H, int W, int team);
void stem(const StemShape& s, const StemWeights& w, const StemIo& io);
size_t dw_ffn_scratch(const DwFfnShape& s, int B, int H, int W, int team);
void dw_ffn(const DwFfnShape& s, const DwFfnWeights& w, const MapIo& io);
size_t cga_scratch(const CgaShape& s, int B, int H, int W, int team);
void cga(const CgaShape& s, const CgaWeights& w, const MapIo& io);
size_t patch_merge_scratch(const PatchMergeShape& s, int B, int H, int W, int team);
void patch_merge(const PatchMergeShape& s, const PatchMergeWeights& w, const MapIo& io);
size_t classifier_scratch(const ClassifierShape& s, int B, int H, int W, int team);
void classifier(const ClassifierShape& s, const ClassifierWeights& w, const MapIo& io);

}  // namespace EVIT_KERNELS
