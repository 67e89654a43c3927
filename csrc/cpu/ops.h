// The five ops of one instruction set: what each kernel takes, and the table that the runtime calls
// through. Every kernel is SPMD: all ranks of a team call it with the same arguments but their own
// rank; it synchronises inside (team.sync()) where one phase reads what another rank wrote, never
// at its end (the runtime does). A team of one is a plain call. No output's sum depends on the
// team's size, the number of images or a tile's remainder.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/shapes.h"
#include "cpu/team.h"

namespace evit::cpu {

// B images of H x W tokens, NHWC, contiguous. x and y never overlap.
struct MapIo {
  const float* x;
  float* y;
  int B, H, W;
  float* scratch;  // <op>_scratch() floats, shared by the team, 64-byte aligned, uninitialised
  Team team;
};

enum class PixelType { kFloat32, kUint8 };

// One image, NCHW by strides (in elements, any sign); y [H/16 rounded up..., C] NHWC.
struct StemIo {
  const void* x;
  PixelType type;
  int64_t stride_c, stride_h, stride_w;
  float* y;
  int H, W;
  float* scratch;
  Team team;
};

struct Kernels {
  const char* name;
  // Scratch of one call, in floats (a multiple of 16), for a team of `team` ranks.
  size_t (*stem_scratch)(const StemShape&, int H, int W, int team);
  size_t (*dw_ffn_scratch)(const DwFfnShape&, int B, int H, int W, int team);
  size_t (*cga_scratch)(const CgaShape&, int B, int H, int W, int team);
  size_t (*patch_merge_scratch)(const PatchMergeShape&, int B, int H, int W, int team);
  size_t (*classifier_scratch)(const ClassifierShape&, int B, int H, int W, int team);
  void (*stem)(const StemShape&, const StemWeights&, const StemIo&);
  void (*dw_ffn)(const DwFfnShape&, const DwFfnWeights&, const MapIo&);
  void (*cga)(const CgaShape&, const CgaWeights&, const MapIo&);
  void (*patch_merge)(const PatchMergeShape&, const PatchMergeWeights&, const MapIo&);
  void (*classifier)(const ClassifierShape&, const ClassifierWeights&, const MapIo&);
};

}  // namespace evit::cpu
