// Depthwise 3x3, padding 1, one output row of one image, 16 channels at a time. Outputs of a row
// stay in registers; each input is loaded once per kernel row. Per output the sum runs from the
// bias over the taps inside the map, top to bottom, left to right, wherever the row is cut.
#pragma once

#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {
namespace {

struct DepthwiseRow {
  const float* x;     // the image [H][W], channel c0 of pixel 0
  long pixel;         // floats between pixels of x
  int H, W;           // input size
  const float* w;     // [9][16] of these channels
  const float* bias;  // [16]
  float* out;         // output pixel 0
  long out_pixel;
};

// Outputs x0 .. x0+N-1 of row y, one vector of channels at offset c. kStride 1 or 2.
template <int N, int kStride, class Emit>
EVIT_INLINE void depthwise_span(const DepthwiseRow& d, int y, int x0, int c, Emit&& emit) {
  f32 acc[N];
  {
    const f32 b = load(d.bias + c);
    EVIT_UNROLL for (int i = 0; i < N; i++) acc[i] = b;
  }
  constexpr int kInputs = kStride * (N - 1) + 3;
  const int in0 = kStride * x0 - 1;
  const bool left = in0<0, right = in0 + kInputs> d.W;
  for (int dy = 0; dy < 3; dy++) {
    const int yy = kStride * y + dy - 1;
    if (yy < 0 || yy >= d.H) continue;
    const float* r = d.x + ((long)yy * d.W + in0) * d.pixel + c;
    const float* w = d.w + dy * 3 * kPanel + c;
    const f32 w0 = load(w), w1 = load(w + kPanel), w2 = load(w + 2 * kPanel);
    EVIT_UNROLL for (int t = 0; t < kInputs; t++) {
      if (t == 0 && left) continue;
      if (t == kInputs - 1 && right) continue;
      const f32 v = load(r + t * d.pixel);
      if constexpr (kStride == 1) {
        if (t < N) acc[t] = fma(v, w0, acc[t]);
        if (t >= 1 && t - 1 < N) acc[t - 1] = fma(v, w1, acc[t - 1]);
        if (t >= 2) acc[t - 2] = fma(v, w2, acc[t - 2]);
      } else {
        if (t % 2 == 0 && t / 2 < N) acc[t / 2] = fma(v, w0, acc[t / 2]);
        if (t % 2 == 1) acc[t / 2] = fma(v, w1, acc[t / 2]);
        if (t % 2 == 0 && t >= 2) acc[t / 2 - 1] = fma(v, w2, acc[t / 2 - 1]);
      }
    }
  }
  EVIT_UNROLL for (int i = 0; i < N; i++) emit(x0 + i, acc[i]);
}

template <int N, int kStride, class Emit>
EVIT_INLINE void depthwise_tail(int n, const DepthwiseRow& d, int y, int x0, int c, Emit&& emit) {
  if constexpr (N > 0) {
    if (n == N)
      depthwise_span<N, kStride>(d, y, x0, c, emit);
    else
      depthwise_tail<N - 1, kStride>(n, d, y, x0, c, emit);
  }
}

// One vector of channels of a whole row; the row is cut into equal spans that fit the registers.
template <int kStride, class Emit>
EVIT_INLINE void depthwise_row(const DepthwiseRow& d, int y, int columns, int c, Emit&& emit) {
  const int spans = (columns + kDwColumns - 1) / kDwColumns;
  for (int i = 0; i < spans; i++) {
    const int x0 = (int)((long)columns * i / spans),
              n = (int)((long)columns * (i + 1) / spans) - x0;
    depthwise_tail<kDwColumns, kStride>(n, d, y, x0, c, emit);
  }
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
