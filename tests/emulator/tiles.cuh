// A kernel over one tile: y = A B^T by every way that an op takes its operands.
#pragma once

#include "instructions.cuh"
#include "launch.cuh"

namespace evit::cuda {

// a, b [16][16]; packed_a, packed_b the same as pack_tiles lays them out; y [3][16][16] float32:
// from shared memory, from packed tiles, and (A B^T) B^T with the accumulator as operand (zeros
// where the family has no such). One warp. Shared memory: 2 * 16 * row_stride(16) numbers.
template <typename Tile>
EVIT_DEVICE void tile_body(float* y, const typename Tile::Number* a, const typename Tile::Number* b,
                           const typename Tile::Number* packed_a,
                           const typename Tile::Number* packed_b) {
  using T = typename Tile::Number;
  constexpr int kStride = row_stride(Tile::kFamily, 16);
  T* s_a = reinterpret_cast<T*>(shared_memory());
  T* s_b = s_a + 16 * kStride;
  constexpr int kWide = 16 / sizeof(T);  // numbers of one copy
  for (int i = lane_id() * kWide; i < 256; i += 32 * kWide) {
    copy_async(s_a + i / 16 * kStride + i % 16, a + i, true);
    copy_async(s_b + i / 16 * kStride + i % 16, b + i, true);
  }
  commit_copies();
  wait_copies<0>();
  sync_warp();

  typename Tile::Fragment f, g;
  typename Tile::Accumulator c[3];
  for (auto& accumulator : c) {
    for (float& d : accumulator.d) d = 0;
  }
  Tile::load_a(f, s_a, kStride);
  Tile::load_b(g, s_b, kStride);
  Tile::mma(c[0], f, g);
  Tile::load_packed_a(f, packed_a);
  Tile::load_packed_b(g, packed_b);
  Tile::mma(c[1], f, g);
  if (Tile::kAccumulatorIsOperand) {
    Tile::from_accumulator(f, c[0]);
    Tile::load_b(g, s_b, kStride);
    Tile::mma(c[2], f, g);
  }
  for (int i = 0; i < 3; i++) {
    for (int e = 0; e < 8; e++) {
      const int half_row = e >> 2, j = e & 3;
      y[(i * 16 + Tile::row(half_row)) * 16 + Tile::column() + j] = c[i].d[Tile::at(half_row, j)];
    }
  }
}

}  // namespace evit::cuda
