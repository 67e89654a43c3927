// Sizes, shared memory, arguments and launches of cga's kernels (cga.cuh); g++ compiles them too.
#pragma once

#include "launch.cuh"

namespace evit::cuda {

constexpr int kCgaHeads = 16;  // at most
constexpr int kCgaKeyDim = 16;

struct CgaSizes {
  int C, heads, window;
  int windows, warps, fused, blocks_per_sm;  // of the attention
  int tokens, projection_warps, split;       // of the projection, where it is apart
  int x_kind, y_kind;                        // kFloat32, ..
  int ks[kCgaHeads];                         // side of q's convolution, by head
};

EVIT_HOST_DEVICE int cga_rows(const CgaSizes& s) {  // R
  return s.windows * ((s.window * s.window + 15) / 16 * 16);
}
EVIT_HOST_DEVICE int cga_largest_ks(const CgaSizes& s) {
  int largest = 1;
  for (int h = 0; h < s.heads; h++) largest = s.ks[h] > largest ? s.ks[h] : largest;
  return largest;
}
// As row_stride, but 4 float32 more than n: no more conflicts, and M5's windows fit in 64 KiB.
EVIT_HOST_DEVICE int cga_stride(int family, int n) {
  return family == 0 ? n + 4 : row_stride(family, n);
}
// Warps that share 16 queries: each computes their scores and its part of the columns of P V.
EVIT_HOST_DEVICE int cga_sharers(const CgaSizes& s) {
  const int tiles = cga_rows(s) / 16;
  return s.warps > tiles ? s.warps / tiles : 1;
}
// Key tiles whose probabilities lie in shared memory at once.
EVIT_HOST_DEVICE int cga_chunk(const CgaSizes& s, int family) {
  const int tiles = cga_rows(s) / s.windows / 16;
  return family == 70 && tiles <= 4 ? tiles : 1;
}

struct CgaMemory {  // bytes from the start of shared memory
  int input, v, k, q, p, raw_q, taps, concat, end;
};
EVIT_HOST_DEVICE CgaMemory cga_memory(const CgaSizes& s, int family) {
  const int R = cga_rows(s), DV = s.C / s.heads, bytes = number_bytes(family);
  const int ks = cga_largest_ks(s), narrow = R * cga_stride(family, kCgaKeyDim) * bytes;
  CgaMemory m = {};
  m.v = m.input + R * cga_stride(family, DV) * bytes;
  m.k = m.v + DV * cga_stride(family, R) * bytes;
  m.q = m.k + narrow;
  m.raw_q = m.q + narrow;
  m.p = m.raw_q;  // which is read before the first probability is there
  int shared_bytes = s.windows * s.window * s.window * kCgaKeyDim * 4;
  if (family == 0 && cga_sharers(s) == 1) {
    m.p = m.q;  // float32: a warp's own 16 queries, which it has used
  } else if (family == 0 || family == 70) {
    const int p_bytes = s.warps * 16 * cga_stride(family, cga_chunk(s, family) * 16) * bytes;
    shared_bytes = p_bytes > shared_bytes ? p_bytes : shared_bytes;
  }
  m.taps = m.raw_q + shared_bytes;
  m.concat = m.taps + (family == 0 ? 0 : ks * ks * kCgaKeyDim * 4);  // float32: from global memory
  m.end = m.concat + (s.fused ? R * cga_stride(family, s.C) * bytes : 0);
  return m;
}

template <typename T>
struct CgaAttentionArgs {
  void* y;                 // [B, H, W, C] of y_kind; where not fused relu(concat), T
  const void* x;           // [B, H, W, C] of x_kind
  const T* qkv;            // packed as A operands [heads][(2 * 16 + DV) / 16][DV / 16]
  const float* qkv_bias;   // [heads][2 * 16 + DV]
  const float* dw;         // [heads][largest ks squared][16]; a head's own ks * ks come first
  const float* dw_bias;    // [heads][16]
  const float* bias;       // [heads][SP / 16][SP / 16][2][32][4]: accumulators, -inf past key S
  const T* proj;           // packed [C / 16][C / 16]
  const float* proj_bias;  // [C]
  i64 B, H, W;
};

template <typename T>
struct CgaProjectionArgs {
  void* y;                 // [T, C] of y_kind
  const T* rows;           // [T, C]: relu(concat)
  const void* x;           // [T, C] of x_kind
  const T* proj;           // packed [C / 16][C / 16]
  const float* proj_bias;  // [C]
  i64 count;               // T
};

EVIT_HOST_DEVICE LaunchShape cga_attention_launch(const CgaSizes& s, int family, i64 B, i64 H,
                                                  i64 W) {
  const i64 windows = B * ceil_div(H, s.window) * ceil_div(W, s.window);
  return {ceil_div(windows, s.windows), 1, s.warps * 32, cga_memory(s, family).end,
          s.blocks_per_sm};
}
EVIT_HOST_DEVICE LaunchShape cga_projection_launch(const CgaSizes& s, int family, i64 B, i64 H,
                                                   i64 W) {
  return {ceil_div(B * H * W, s.tokens), s.split, s.projection_warps * 32,
          s.tokens * row_stride(family, s.C) * number_bytes(family)};
}

}  // namespace evit::cuda
