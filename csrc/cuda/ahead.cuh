// Rows in shared memory times packed weights in global memory, as gemm.cuh, with the weights of
// several k-steps under way: for products whose warps have few column tiles and a long k, where the
// time of a step is the way of its weights from L2.
#pragma once

#include "device.cuh"

namespace evit::cuda {

// k-steps of N weight fragments under way: the largest divisor of KT that takes at most 48
// registers. Fragments of float32 are addresses; nothing is under way.
template <typename Tile>
EVIT_HOST_DEVICE int steps_ahead(int KT, int N) {
  if (Tile::kFamily == 0) return 1;
  const int most = 192 / (N * static_cast<int>(sizeof(typename Tile::Fragment)));
  int steps = 1;
  for (int d = 2; d <= most; d++) steps = KT % d == 0 ? d : steps;
  return steps;
}

// The sums of one warp: M neighbouring row tiles x N column tiles that lie APART tiles from each
// other. Weights: [NT][STEPS] tiles packed as B operands. D of steps_ahead().
template <typename Tile, int M, int N, int APART, int STEPS, int D>
struct AheadProduct {
  using T = typename Tile::Number;
  typename Tile::Accumulator c[N][M];
  typename Tile::Fragment b[D][N];
  const T* weights;
  int first, end;  // column tiles of this warp: first, first + APART, .. < end

  EVIT_DEVICE void start(const T* EVIT_RESTRICT g_weights, int first_tile, int NT) {
    weights = g_weights + static_cast<i64>(first_tile) * STEPS * Tile::kPacked;
    first = first_tile, end = NT;
    EVIT_UNROLL
    for (int k = 0; k < D; k++) fetch(k, k);
    EVIT_UNROLL
    for (int n = 0; n < N; n++) {
      EVIT_UNROLL
      for (int m = 0; m < M; m++) {
        EVIT_UNROLL
        for (float& d : c[n][m].d) d = 0.0f;
      }
    }
  }

  // c += rows weights^T for the k-steps k0 .. k0 + KT - 1; rows [M * 16][KT * 16], `stride` numbers
  // apart. Calls follow each other in k. KT is a multiple of D.
  template <int KT>
  EVIT_DEVICE void add(const T* s_rows, int stride, int k0) {
    static_assert(KT % D == 0, "a step's weights lie in registers that are known when compiling");
    for (int k = 0; k < KT; k += D) {
      EVIT_UNROLL
      for (int j = 0; j < D; j++) {
        typename Tile::Fragment a[M];
        EVIT_UNROLL
        for (int m = 0; m < M; m++) {
          Tile::load_a(a[m], s_rows + m * 16 * stride + (k + j) * 16, stride);
        }
        EVIT_UNROLL
        for (int n = 0; n < N; n++) {
          if (first + n * APART >= end) continue;
          EVIT_UNROLL
          for (int m = 0; m < M; m++) Tile::mma(c[n][m], a[m], b[j][n]);
        }
        if (k0 + k + j + D < STEPS) fetch(j, k0 + k + j + D);
      }
    }
  }

  // store(row, column, c) for every accumulator: its tile starts there, rows from this warp's on.
  template <typename Store>
  EVIT_DEVICE void each(Store store) const {
    EVIT_UNROLL
    for (int n = 0; n < N; n++) {
      if (first + n * APART >= end) continue;
      EVIT_UNROLL
      for (int m = 0; m < M; m++) store(m * 16, (first + n * APART) * 16, c[n][m]);
    }
  }

 private:
  EVIT_DEVICE void fetch(int j, int k) {
    EVIT_UNROLL
    for (int n = 0; n < N; n++) {
      if (first + n * APART >= end) continue;
      Tile::load_packed_b(b[j][n], weights + (n * APART * STEPS + k) * Tile::kPacked);
    }
  }
};

}  // namespace evit::cuda
