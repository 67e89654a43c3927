// Rows in shared memory times packed weights in global memory: every matrix product of the ops but
// those inside attention.
#pragma once

#include "device.cuh"

namespace evit::cuda {

// How the warps of a block share MT row tiles and the column tiles: kRows x kColumns warps, each
// with MT / kRows row tiles. Two rows of warps: a weight fragment is read twice, and a block of 64
// rows still has its accumulators in registers (on a model of a V100, one row of warps costs a
// projection 21 %, cga_v100).
template <int WARPS, int MT>
struct WarpGrid {
  static constexpr int kRows = MT % 2 == 0 && WARPS % 2 == 0 ? 2 : 1;
  static constexpr int kColumns = WARPS / kRows;
  static constexpr int kRowTiles = MT / kRows;
};

// Column tile j of a group that starts at n0.
template <typename Grid>
EVIT_DEVICE int column_tile(int n0, int j) {
  return n0 + j * Grid::kColumns;
}

// c[j][m] += rows[m] weights[n]^T for the row tiles m of this warp and its column tiles n = n0 + j
// * kColumns < NT. rows [MT * 16][KT * 16] in shared memory, `stride` numbers apart; weights: tiles
// packed as B operands, those of column tile n from g_weights + n * pitch tiles on.
template <typename Tile, int WARPS, int MT, int KT, int GROUP>
EVIT_DEVICE void multiply_into(
    typename Tile::Accumulator (&c)[GROUP][WarpGrid<WARPS, MT>::kRowTiles],
    const typename Tile::Number* s_rows, int stride,
    const typename Tile::Number* EVIT_RESTRICT g_weights, int pitch, int n0, int NT) {
  using Grid = WarpGrid<WARPS, MT>;
  constexpr int M = Grid::kRowTiles;
  s_rows += warp_id() % Grid::kRows * M * 16 * stride;
  // Weights come from L2: a step's are asked for while the step before is multiplied.
  typename Tile::Fragment a[M], b[2][GROUP];
  const auto load_weights = [&](int k, typename Tile::Fragment* to) {
    EVIT_UNROLL
    for (int j = 0; j < GROUP; j++) {
      const int n = column_tile<Grid>(n0, j);
      if (n < NT) Tile::load_packed_b(to[j], g_weights + (n * pitch + k) * Tile::kPacked);
    }
  };
  const auto step = [&](int k, int parity) {
    if (k + 1 < KT) load_weights(k + 1, b[parity ^ 1]);
    EVIT_UNROLL
    for (int m = 0; m < M; m++) Tile::load_a(a[m], s_rows + m * 16 * stride + k * 16, stride);
    EVIT_UNROLL
    for (int j = 0; j < GROUP; j++) {
      if (column_tile<Grid>(n0, j) >= NT) continue;
      EVIT_UNROLL
      for (int m = 0; m < M; m++) Tile::mma(c[j][m], a[m], b[parity][j]);
    }
  };
  load_weights(0, b[0]);
  for (int k = 0; k < KT; k += 2) {
    step(k, 0);
    if (k + 1 < KT) step(k + 1, 1);
  }
}

template <typename Accumulator, int GROUP, int M>
EVIT_DEVICE void clear(Accumulator (&c)[GROUP][M]) {
  EVIT_UNROLL
  for (int j = 0; j < GROUP; j++) {
    EVIT_UNROLL
    for (int m = 0; m < M; m++) {
      EVIT_UNROLL
      for (float& d : c[j][m].d) d = 0.0f;
    }
  }
}

// store(row, column, c) for every accumulator of a group: c's tile starts at (row, column).
template <int WARPS, int MT, typename Accumulator, int GROUP, int M, typename Store>
EVIT_DEVICE void store_tiles(const Accumulator (&c)[GROUP][M], int n0, int NT, Store store) {
  using Grid = WarpGrid<WARPS, MT>;
  const int first_row = warp_id() % Grid::kRows * M;
  EVIT_UNROLL
  for (int j = 0; j < GROUP; j++) {
    const int n = column_tile<Grid>(n0, j);
    if (n >= NT) continue;
    EVIT_UNROLL
    for (int m = 0; m < M; m++) store((first_row + m) * 16, n * 16, c[j][m]);
  }
}

// The whole product: store(row, column, rows weights^T) for all NT column tiles, weights [NT][KT].
template <typename Tile, int WARPS, int MT, int KT, int GROUP, typename Store>
EVIT_DEVICE void multiply(const typename Tile::Number* s_rows, int stride,
                          const typename Tile::Number* EVIT_RESTRICT g_weights, int NT,
                          Store store) {
  using Grid = WarpGrid<WARPS, MT>;
  for (int n0 = warp_id() / Grid::kRows; n0 < NT; n0 += Grid::kColumns * GROUP) {
    typename Tile::Accumulator c[GROUP][Grid::kRowTiles];
    clear(c);
    multiply_into<Tile, WARPS, MT, KT, GROUP>(c, s_rows, stride, g_weights, KT, n0, NT);
    store_tiles<WARPS, MT>(c, n0, NT, store);
  }
}

}  // namespace evit::cuda
