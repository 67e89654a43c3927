// The packed layout: one per dtype, the same for every instruction set.
//   panel        [N][K]       -> [ceil(N/16)][K][16]         16 output channels side by side, one
//   line per k conv_planar  [N][I][3][3] -> panel with k = (dy, i, dx)   for inputs kept in planes
//   conv_nhwc    [N][I][3][3] -> panel with k = (dy, dx, i)   for NHWC inputs
//   conv_first   [N][I][3][3] -> [N/8][(dy, i, dx)][8]
//   depthwise    [C][h][w]    -> [C/16][h*w][16]
//   vector       [n]          -> n padded to 16
//   scores       [S][S]       -> transposed, [S keys][SP queries]
// Padding is zero. depthwise, vector and scores stay float32 in reduced precision.
#pragma once

#include "common/grammar.h"

namespace evit {

// Writes a section (natural float64 array, C order) at out; out has section.bytes() bytes.
void pack_section(const Section& s, const double* natural, void* out);

// Weights of an op, bound to a blob that parse_program has accepted; float32 ops only.
void bind_weights(const Op& op, const void* blob, StemWeights* w);
void bind_weights(const Op& op, const void* blob, DwFfnWeights* w);
void bind_weights(const Op& op, const void* blob, CgaWeights* w);
void bind_weights(const Op& op, const void* blob, PatchMergeWeights* w);
void bind_weights(const Op& op, const void* blob, ClassifierWeights* w);

}  // namespace evit
