// Windows of a map: which tokens of x a window holds, and its way back. The map is padded with
// zeros at the bottom and right to a multiple of the window; a row of tokens is addressed through a
// table of pointers, where padding points at a row of zeros, so nothing that reads a window has to
// know about borders.
#pragma once

#include "cpu/gemm.h"

namespace evit::cpu::EVIT_ISA {
namespace {

struct WindowGrid {
  int B, H, W, C, WIN;
  int down, across;  // windows of one image

  int count() const { return B * down * across; }
  bool single() const { return H == WIN && W == WIN; }  // a window is an image: no gather, no crop
};

EVIT_INLINE WindowGrid window_grid(int B, int H, int W, int C, int WIN) {
  return {B, H, W, C, WIN, (H + WIN - 1) / WIN, (W + WIN - 1) / WIN};
}

struct Window {
  long origin;        // token of x at its top left corner
  int rows, columns;  // inside the map
};

EVIT_INLINE Window window_at(const WindowGrid& g, int index) {
  const int column = index % g.across * g.WIN, row = index / g.across % g.down * g.WIN;
  const int image = index / (g.across * g.down);
  const int rows = g.H - row, columns = g.W - column;
  return {((long)image * g.H + row) * g.W + column, rows < g.WIN ? rows : g.WIN,
          columns < g.WIN ? columns : g.WIN};
}

// tokens [WIN*WIN] = where each token's channels are; zeros [C].
EVIT_INLINE void window_tokens(const WindowGrid& g, const Window& win, const float* x,
                               const float* zeros, const float** tokens) {
  for (int r = 0; r < g.WIN; r++) {
    const float* p = x + (win.origin + (long)r * g.W) * g.C;
    const int inside = r < win.rows ? win.columns : 0;
    for (int i = 0; i < inside; i++) *tokens++ = p + (long)i * g.C;
    for (int i = inside; i < g.WIN; i++) *tokens++ = zeros;
  }
}

// Channels 0..N-1 of tokens t0..t1 into out [..][N].
EVIT_INLINE void gather(const float* const* tokens, int t0, int t1, int N, float* out) {
  for (int t = t0; t < t1; t++)
    for (int n = 0; n < N; n += kLanes) store(out + (long)t * N + n, load(tokens[t] + n));
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
