// The register tile and its drivers. Rows outer, panels inner: the rows of A (14 x K) stay in L1
// while the panels stream from L2; panels outer loses up to 25 % once C leaves L2. Rows are spread
// evenly over the tiles (49 = 13+12+12+12).
#include "cpu/gemm.h"

namespace evit::cpu::EVIT_ISA {
namespace {

// MR rows x NP panels. B is prefetched kAhead steps early, per panel: panels are contiguous, so
// running over the end of one fetches the next; never a loss, 4-8 points when the weights come from
// L3.
template <int MR, int NP, Epilogue E, int kAhead>
EVIT_NOINLINE void tile(const GemmArgs& g, const float* a, const float* w, const float* bias,
                        float* c, const float* r) {
  constexpr int NV = NP * kVecs;
  const long lda = g.lda, panel = (long)g.K * kPanel;
  f32 acc[MR][NV];
  EVIT_UNROLL for (int j = 0; j < NV; j++) {
    const f32 b = load(bias + kLanes * j);
    EVIT_UNROLL for (int i = 0; i < MR; i++) acc[i][j] = b;
  }
  for (int k = 0; k < g.K; k++) {
    f32 b[NV];
    EVIT_UNROLL for (int j = 0; j < NV; j++) {
      b[j] = load(w + (j / kVecs) * panel + (j % kVecs) * kLanes);
    }
    EVIT_UNROLL for (int p = 0; p < NP; p++) prefetch(w + p * panel + kPanel * kAhead);
    EVIT_UNROLL for (int i = 0; i < MR; i++) {
      const f32 x = splat(a[i * lda + k]);
      EVIT_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fma(x, b[j], acc[i][j]);
    }
    w += kPanel;
  }
  EVIT_UNROLL for (int i = 0; i < MR; i++) {
    EVIT_UNROLL for (int j = 0; j < NV; j++) {
      f32 v = acc[i][j];
      if (E == Epilogue::kRelu) v = relu(v);
      if (E == Epilogue::kResidual) v += load(r + i * g.ldr + kLanes * j);
      store(c + i * g.ldc + kLanes * j, v);
    }
  }
}

// Panels p0..p1 with tiles of at most MR rows and exactly NP panels (p1 - p0 is a multiple of NP).
template <int MR, int NP, Epilogue E, int kAhead, int R>
EVIT_INLINE void tile_rows(int rows, const GemmArgs& g, const float* a, const float* w,
                           const float* bias, float* c, const float* r) {
  if constexpr (R == 1) {
    tile<1, NP, E, kAhead>(g, a, w, bias, c, r);
  } else {
    if (rows == R)
      tile<R, NP, E, kAhead>(g, a, w, bias, c, r);
    else
      tile_rows<MR, NP, E, kAhead, R - 1>(rows, g, a, w, bias, c, r);
  }
}

template <int MR, int NP, Epilogue E, int kAhead = 16>
void region(const GemmArgs& g, int p0, int p1) {
  const int tiles = (g.T + MR - 1) / MR;
  for (int t = 0; t < tiles; t++) {
    const int t0 = (int)((long)g.T * t / tiles), rows = (int)((long)g.T * (t + 1) / tiles) - t0;
    for (int p = p0; p < p1; p += NP) {
      const int n = p * kPanel;
      tile_rows<MR, NP, E, kAhead, MR>(rows, g, g.a + t0 * g.lda, g.w + (long)n * g.K, g.bias + n,
                                       g.c + t0 * g.ldc + n, g.r + t0 * g.ldr + n);
    }
  }
}

// A single row (squeeze-excite, classifier of one image): as many panels side by side as registers
// allow.
template <int NP, Epilogue E>
void row(const GemmArgs& g, int p, int p1) {
  for (; p + NP <= p1; p += NP) {
    const int n = p * kPanel;
    tile<1, NP, E, 12>(g, g.a, g.w + (long)n * g.K, g.bias + n, g.c + n, g.r + n);
  }
  if constexpr (NP > 1) {
    if (p < p1) row<NP / 2, E>(g, p, p1);
  }
}

template <Epilogue E>
void gemm_any(const GemmArgs& g) {
  const int panels = g.N / kPanel;
  if (g.T <= 0 || panels <= 0) return;
  if (g.T == 1) return row<kMaxPanels, E>(g, 0, panels);
  // 16 rows (one image of stage 3): every weight is loaded once, broadcasts are operands of the
  // FMA.
  if (kRows1 == 16 && g.T == 16) return region<kRows1, 1, E, 48>(g, 0, panels);
  int done = 0;
  if constexpr (kRows4 > 1) {
    if (g.T <= kRows4) {
      done = panels / 4 * 4;
      region<kRows4, 4, E>(g, 0, done);
    }
  }
  if constexpr (kRows2 * kVecs * 2 >= 12) {
    const int rest = panels - done;
    const int threes = kRows3 > 0 && rest % 2 == 1 && rest >= 3;  // an odd count ends in 48 columns
    const int twos = (rest - 3 * threes) / 2;
    if (kRows2 > 3 || g.T <= 3) {
      region<kRows2, 2, E>(g, done, done + 2 * twos);
      done += 2 * twos;
      if constexpr (kRows3 > 0) {
        if (threes) region<kRows3, 3, E>(g, done, done + 3);
        done += 3 * threes;
      }
    }
  }
  if (done < panels) region<kRows1, 1, E>(g, done, panels);
}

}  // namespace

void gemm(Epilogue e, const GemmArgs& args) {
  GemmArgs g = args;
  if (!g.r) g.r = g.c, g.ldr = g.ldc;  // addressed, never read
  switch (e) {
    case Epilogue::kBias:
      return gemm_any<Epilogue::kBias>(g);
    case Epilogue::kRelu:
      return gemm_any<Epilogue::kRelu>(g);
    case Epilogue::kResidual:
      return gemm_any<Epilogue::kResidual>(g);
  }
}

}  // namespace evit::cpu::EVIT_ISA
