// Declarations of one instruction set's kernels; only instruction-set files include this.
#pragma once

#include "cpu/ops.h"

namespace evit::cpu::EVIT_ISA {

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

}  // namespace evit::cpu::EVIT_ISA
