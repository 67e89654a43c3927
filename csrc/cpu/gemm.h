// Dense token-wise layers: C = epilogue(A * W^T + bias) with W in packed panels [N/16][K][16]
// (common/layout.h). Every output is one FMA chain over k = 0..K-1 that starts from the bias,
// whatever the tile, so its bits depend on neither the number of rows nor the split over ranks.
#pragma once

#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {

enum class Epilogue { kBias, kRelu, kResidual };  // kResidual adds r after the sum

struct GemmArgs {
  int T, K, N;     // rows, depth, columns (N a multiple of 16)
  const float* a;  // [T][K], row stride lda
  long lda;
  const float* w;     // packed panels of these N columns
  const float* bias;  // [N]
  float* c;           // [T][N], row stride ldc
  long ldc;
  const float* r;  // [T][N], row stride ldr; kResidual only
  long ldr;
};

void gemm(Epilogue e, const GemmArgs& g);

namespace {

// The columns (whole panels) of a layer that belong to one rank.
EVIT_INLINE GemmArgs gemm_columns(GemmArgs g, int rank, int size) {
  const int panels = g.N / kPanel;
  const int p0 = (int)((long)panels * rank / size), p1 = (int)((long)panels * (rank + 1) / size);
  g.N = (p1 - p0) * kPanel;
  g.w += (long)p0 * kPanel * g.K;
  g.bias += p0 * kPanel;
  g.c += p0 * kPanel;
  if (g.r) g.r += p0 * kPanel;
  return g;
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
