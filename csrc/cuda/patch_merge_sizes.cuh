// Sizes, tiles, shared memory, arguments and launches of patch_merge.cuh.
#pragma once

#include "launch.cuh"

namespace evit::cuda {

struct PatchMergeSizes {
  int C, F, R, CO;
  int tokens, hidden;  // whole, hidden: rows of x at once, a multiple of 16; channels of a step
  int warps;           // of any stage but squeeze and excite
  int images;          // whole: of a block; hidden: of a tile at most
  int outputs;         // whole: of a map at most
  int steps;           // hidden: of a block
  int group, lines;    // squeeze, excite: images of a block, rows of the matrix of a warp
  int rows, split;     // project: outputs of a block, a multiple of 16; blocks that share CO
  int blocks_per_sm;
  int x_kind, y_kind;  // kFloat32, ..
};

constexpr int kPatchMergeDenseWarps = 4;  // of squeeze and excite

// ---- tiles: the outputs that a block makes at once

// Outputs of a row or column of n tokens for which `most` tokens are enough, in parts of one size.
// An output reads the tokens 2 o - 1 to 2 o + 1. Where two parts do, the first has no token before.
EVIT_HOST_DEVICE int patch_merge_fit(int n, int most) {
  const int outputs = (n + 1) / 2, half = (outputs + 1) / 2, rest = n - 2 * half + 1;
  if (n <= most) return outputs;
  if ((2 * half > rest ? 2 * half : rest) <= most) return half;
  const int fit = most < 3 ? 0 : (most - 1) / 2;
  return fit == 0 ? 0 : (outputs + (outputs + fit - 1) / fit - 1) / ((outputs + fit - 1) / fit);
}

// Maps of a tile at most. One of more than 16 outputs that shares its tile is too rare for the
// bytes of another map's sums: two images of F = 768 would not fit in 227 KiB.
EVIT_HOST_DEVICE int patch_merge_tile_images(const PatchMergeSizes& s) {
  return s.outputs > 16 ? 1 : s.images;
}

struct PatchMergeTiling {
  int images;         // of a tile; more than one only where a tile is the whole map
  int rows, columns;  // outputs of a tile of one image
  int down, across;   // tiles of a map
};
// Whole maps where `tokens` hold them; else whole rows where two rows of outputs fit; else squares.
EVIT_HOST_DEVICE PatchMergeTiling patch_merge_tiling(const PatchMergeSizes& s, i64 H, i64 W) {
  const int h = static_cast<int>(H), w = static_cast<int>(W);
  const int OH = (h + 1) / 2, OW = (w + 1) / 2;
  if (H * W <= s.tokens) {
    const int fit = s.tokens / (h * w), most = patch_merge_tile_images(s);
    return {fit < most ? fit : most, OH, OW, 1, 1};
  }
  int rows = patch_merge_fit(h, s.tokens / w), columns = OW;
  if (rows < 2) {
    int side = 3;
    while ((side + 2) * (side + 2) <= s.tokens) side += 2;
    rows = patch_merge_fit(h, side);
    columns = patch_merge_fit(w, s.tokens / (h < side ? h : side));
  }
  return {1, rows, columns, (OH + rows - 1) / rows, (OW + columns - 1) / columns};
}

// ---- shared memory, in bytes from its start

EVIT_HOST_DEVICE int patch_merge_output_rows(const PatchMergeSizes& s) {
  return (s.images * s.outputs + 15) / 16 * 16;
}

// g has no rows of padding: the last tile of 16 reads what lies behind it, and its sums are
// dropped.
struct PatchMergeMemory {
  int g, x, h, parts, sums, squeezed, end;
};
EVIT_HOST_DEVICE PatchMergeMemory patch_merge_memory(const PatchMergeSizes& s, int family,
                                                     bool whole) {
  const int bytes = number_bytes(family), g_row = row_stride(family, s.F) * bytes;
  PatchMergeMemory m = {};
  m.x = whole ? s.images * s.outputs * g_row : 0;
  m.h = m.x + s.tokens * row_stride(family, s.C) * bytes;
  m.parts = m.h + s.tokens * row_stride(family, s.hidden) * bytes;
  m.sums = m.parts + patch_merge_tile_images(s) * s.warps * 32 * 4 * 4;  // four channels a thread
  m.squeezed = m.sums + (whole ? s.images * s.F * 4 : 0);
  m.end = m.squeezed + (whole ? s.images * s.R * 4 : 0);
  const int read = whole ? patch_merge_output_rows(s) * g_row : 0;
  if (m.end < read) m.end = read;
  return m;
}

// Hidden channels of g that `project` has in shared memory at once: all steps are of one size.
EVIT_HOST_DEVICE int patch_merge_chunk(int F) {
  int chunk = 128;
  while (F % chunk != 0) chunk -= 16;
  return chunk;
}

// ---- arguments

// The matrices w1 and w3 are packed as B operands, se1 and se2 lie as they are.
template <typename T>
struct PatchMergeWholeArgs {
  void* y;                // [B, OH, OW, CO] of y_kind
  const void* x;          // [B, H, W, C] of x_kind
  const T* w1;            // packed [F / 16][C / 16]
  const float* b1;        // [F]
  const float* dw;        // [9][F]
  const float* dw_bias;   // [F]
  const T* se1;           // [R][F]
  const float* se1_bias;  // [R]
  const T* se2;           // [F][R]
  const float* se2_bias;  // [F]
  const T* w3;            // packed [CO / 16][F / 16]
  const float* b3;        // [CO]
  i64 B, H, W;
};

template <typename T>
struct PatchMergeHiddenArgs {
  T* g;           // [B, OH, OW, F]
  float* sums;    // [B][tiles of a map][F]
  const void* x;  // [B, H, W, C] of x_kind
  const T* w1;    // as above, to dw_bias
  const float* b1;
  const float* dw;
  const float* dw_bias;
  i64 B, H, W;
};

template <typename T>
struct PatchMergeDenseArgs {
  float* out;        // squeeze [B][R]; excite [B][F]
  const float* in;   // squeeze [B][parts][F], whose mean is over `count` outputs; excite [B][R]
  const T* weights;  // se1, se2
  const float* bias;
  i64 B, parts, count;
};

template <typename T>
struct PatchMergeProjectArgs {
  void* y;            // [B, OH, OW, CO] of y_kind
  const T* g;         // [B, OH, OW, F]
  const float* gate;  // [B][F]
  const T* w3;        // packed [CO / 16][F / 16]
  const float* b3;    // [CO]
  i64 B, outputs;     // of a map
};

// ---- launches

EVIT_HOST_DEVICE LaunchShape patch_merge_whole_launch(const PatchMergeSizes& s, int family, i64 B,
                                                      i64, i64) {
  return {ceil_div(B, s.images), 1, s.warps * 32, patch_merge_memory(s, family, true).end,
          s.blocks_per_sm};
}
EVIT_HOST_DEVICE LaunchShape patch_merge_hidden_launch(const PatchMergeSizes& s, int family, i64 B,
                                                       i64 H, i64 W) {
  const PatchMergeTiling t = patch_merge_tiling(s, H, W);
  return {ceil_div(B, t.images) * t.down * t.across, ceil_div(s.F, s.hidden * s.steps),
          s.warps * 32, patch_merge_memory(s, family, false).end, s.blocks_per_sm};
}
EVIT_HOST_DEVICE LaunchShape patch_merge_dense_launch(const PatchMergeSizes& s, i64 B, int N,
                                                      int K) {
  return {ceil_div(B, s.group), ceil_div(N, kPatchMergeDenseWarps * s.lines),
          kPatchMergeDenseWarps * 32, s.group * K * 4};
}
EVIT_HOST_DEVICE LaunchShape patch_merge_squeeze_launch(const PatchMergeSizes& s, int, i64 B, i64,
                                                        i64) {
  return patch_merge_dense_launch(s, B, s.R, s.F);
}
EVIT_HOST_DEVICE LaunchShape patch_merge_excite_launch(const PatchMergeSizes& s, int, i64 B, i64,
                                                       i64) {
  return patch_merge_dense_launch(s, B, s.F, s.R);
}
EVIT_HOST_DEVICE LaunchShape patch_merge_project_launch(const PatchMergeSizes& s, int family, i64 B,
                                                        i64 H, i64 W) {
  const int chunk = row_stride(family, patch_merge_chunk(s.F)) * number_bytes(family);
  return {ceil_div(B * ceil_div(H, 2) * ceil_div(W, 2), s.rows), s.split, s.warps * 32,
          2 * s.rows * chunk, s.blocks_per_sm};
}

}  // namespace evit::cuda
