// The 3x3 stride-2 convolutions of the stem, one output row a call. Every output is one FMA chain
// from the bias over the taps in the order of the packed weights, rows outside the image left out,
// whatever the tile.
#pragma once

#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {
namespace {

struct Taps {  // the input rows of one output row; only dy0 <= dy < dy1 are used
  const float* row[3];
  int dy0, dy1;
};

// --- conv1, vectorised over pixels: its 8 to 24 channels would leave lanes empty. Planar in,
// planar out.
struct Conv1 {
  Taps taps;  // rows of stem_input.h
  int in, N;
  long ld_in;
  int W;           // output pixels
  const float* w;  // [N/8][(dy, ci, dx)][8]
  const float* bias;
  float* out;  // pixel 0 of channel 0; rows are written to a multiple of kLanes
  long ld_out;
};

// NC channels from c on x NV vectors of pixels from x on.
template <int NC, int NV>
EVIT_NOINLINE void conv1_tile(const Conv1& g, int c, int x) {
  f32 acc[NC][NV];
  EVIT_UNROLL for (int i = 0; i < NC; i++) {
    const f32 b = splat(g.bias[c + i]);
    EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = b;
  }
  for (int dy = g.taps.dy0; dy < g.taps.dy1; dy++) {
    const float* p = g.taps.row[dy] + x;
    const float* w = g.w + (long)(c / 8) * g.in * 72 + c % 8 + dy * g.in * 24;
    const long even = g.ld_in;
    int dx = 0;
    for (int k = 0; k < 3 * g.in; k++, w += 8) {  // a loop over dx would be unrolled: see conv_tile
      f32 v[NV];
      EVIT_UNROLL for (int j = 0; j < NV; j++) v[j] = load(p + kLanes * j);
      EVIT_UNROLL for (int i = 0; i < NC; i++) {
        const f32 s = splat(w[i]);
        EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma(s, v[j], acc[i][j]);
      }
      // From odd[x] to even[x], to odd[x + 1], to odd[x] of the next channel.
      p += dx == 0 ? even : dx == 1 ? 1 - even : 2 * even - 1;
      dx = dx < 2 ? dx + 1 : 0;
    }
  }
  EVIT_UNROLL for (int i = 0; i < NC; i++) {
    float* out = g.out + (c + i) * g.ld_out + x;
    EVIT_UNROLL for (int j = 0; j < NV; j++) store(out + kLanes * j, relu(acc[i][j]));
  }
}

template <int NC, int NV>
EVIT_INLINE void conv1_vectors(int vectors, const Conv1& g, int c, int x) {
  if constexpr (NV > 1) {
    if (vectors < NV) return conv1_vectors<NC, NV - 1>(vectors, g, c, x);
  }
  conv1_tile<NC, NV>(g, c, x);
}

EVIT_NOINLINE void conv1_row(const Conv1& g) {
  constexpr int NC = kConv1Channels, NV = kConv1Vectors;
  const int vectors = (g.W + kLanes - 1) / kLanes, tiles = (vectors + NV - 1) / NV;
  for (int c = 0; c < g.N; c += NC) {
    for (int t = 0; t < tiles; t++) {  // spread evenly: 7 vectors = 2 + 2 + 3
      const int v0 = (int)((long)vectors * t / tiles), v1 = (int)((long)vectors * (t + 1) / tiles);
      conv1_vectors<NC, NV>(v1 - v0, g, c, v0 * kLanes);
    }
  }
  if (g.W % 2) {  // the pixel to the right of the image
    for (int c = 0; c < g.N; c++) g.out[c * g.ld_out + g.W] = 0.0f;
  }
}

// --- conv2, conv3, conv4: implicit GEMM, pixels x panels of 16 output channels, NHWC out. The
// input is broadcast, and a broadcast reads any layout: conv2 takes conv1's planar rows as they
// are, taps in the order (dy, ci, dx); conv3 and conv4 take NHWC rows, where the taps of a row are
// 3*CI neighbours (dy, dx, ci).
enum class Rows { kPlanar, kNhwc };

struct Conv {
  Taps taps;       // each row at pixel -1
  int CI, N;       // input, output channels
  long ld_in;      // kPlanar: floats from channel to channel
  int W;           // output pixels
  const float* w;  // panels [N/16][9*CI][16]
  const float* bias;
  float* out;  // [W][N]
};

// One step of K: MR pixels, `stride` floats apart, times NP panels.
template <int MR, int NP>
EVIT_INLINE void conv_step(f32 (&acc)[MR][NP * kVecs], const float* a, long stride, const float* w,
                           long panel) {
  f32 b[NP * kVecs];
  EVIT_UNROLL for (int j = 0; j < NP * kVecs; j++) {
    b[j] = load(w + (j / kVecs) * panel + (j % kVecs) * kLanes);
  }
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    const f32 s = splat(a[i * stride]);
    EVIT_UNROLL for (int j = 0; j < NP * kVecs; j++) acc[i][j] = fma(s, b[j], acc[i][j]);
  }
}

// MR pixels from x on, NP panels from channel n on.
template <Rows R, bool Relu, int NP, int MR>
EVIT_NOINLINE void conv_tile(const Conv& g, int x, int n) {
  constexpr int NV = NP * kVecs;
  const int K = 3 * g.CI;  // of one tap row
  const long panel = 3L * K * kPanel;
  f32 acc[MR][NV];
  EVIT_UNROLL for (int j = 0; j < NV; j++) {
    const f32 b = load(g.bias + n + kLanes * j);
    EVIT_UNROLL for (int i = 0; i < MR; i++) acc[i][j] = b;
  }
  for (int dy = g.taps.dy0; dy < g.taps.dy1; dy++) {
    const float* w = g.w + 3L * K * n + (long)dy * K * kPanel;
    const long stride = R == Rows::kPlanar ? 2 : 2L * g.CI;  // floats from pixel to pixel
    const float* a = g.taps.row[dy] + x * stride;
    int dx = 0;
    for (int k = 0; k < K; k++, w += kPanel) {
      if (R == Rows::kNhwc) {
        EVIT_UNROLL for (int p = 0; p < NP; p++) prefetch(w + p * panel + kPanel * 16);
      }
      conv_step<MR, NP>(acc, a, stride, w, panel);
      if (R == Rows::kPlanar) {  // a loop over dx would be unrolled, and the tile would spill
        a += ++dx < 3 ? 1 : g.ld_in - 2;
        dx = dx < 3 ? dx : 0;
      } else {
        a++;
      }
    }
  }
  float* out = g.out + (long)x * g.N + n;
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    EVIT_UNROLL for (int j = 0; j < NV; j++) {
      store(out + (long)i * g.N + kLanes * j, Relu ? relu(acc[i][j]) : acc[i][j]);
    }
  }
}

template <Rows R, bool Relu, int NP, int MR>
EVIT_INLINE void conv_pixels(int pixels, const Conv& g, int x, int n) {
  if constexpr (MR > 1) {
    if (pixels < MR) return conv_pixels<R, Relu, NP, MR - 1>(pixels, g, x, n);
  }
  conv_tile<R, Relu, NP, MR>(g, x, n);
}

// Panels p0..p1, NP at a time. Pixels outer: their input stays in L1 while the panels stream from
// L2. Pixels are spread evenly over the tiles (26 = 13 + 13).
template <Rows R, bool Relu, int NP, int MR>
EVIT_INLINE void conv_panels(const Conv& g, int p0, int p1) {
  const int tiles = (g.W + MR - 1) / MR;
  for (int t = 0; t < tiles; t++) {
    const int x0 = (int)((long)g.W * t / tiles), x1 = (int)((long)g.W * (t + 1) / tiles);
    for (int p = p0; p < p1; p += NP) conv_pixels<R, Relu, NP, MR>(x1 - x0, g, x0, p * kPanel);
  }
}

// Any number of panels, by threes where the count is odd.
EVIT_NOINLINE void conv2_row(const Conv& g) {
  const int panels = g.N / kPanel;
  if constexpr (kRows3 > 0) {
    if (panels == 1) return conv_panels<Rows::kPlanar, true, 1, kRows1>(g, 0, 1);
    const int threes = panels % 2 ? 3 : 0;
    if (threes) conv_panels<Rows::kPlanar, true, 3, kRows3>(g, 0, threes);
    conv_panels<Rows::kPlanar, true, 2, kRows2>(g, threes, panels);
  } else {
    conv_panels<Rows::kPlanar, true, 1, kRows1>(g, 0, panels);
  }
}

// conv3 and conv4: an even number of panels.
template <bool Relu>
EVIT_NOINLINE void conv_nhwc_row(const Conv& g) {
  constexpr int NP = kRows3 > 0 ? 2 : 1;
  conv_panels<Rows::kNhwc, Relu, NP, NP == 2 ? kRows2 : kRows1>(g, 0, g.N / kPanel);
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
