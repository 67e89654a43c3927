// 16x16x16 products of 16-bit numbers on one warp, from sm_80: mma.m16n8k16.
//
//   accumulator[row][column] += sum over k of A[row][k] * B[column][k]
//
// Both operands have k next to each other in memory. Two permutations make every access wide:
//  - the columns of a tile, so that a lane owns four neighbouring ones: stores of 8 bytes;
//  - k, in the same way on both sides, so that a lane's k are neighbours: loads of 8 bytes, and an
//    accumulator becomes an A operand without a shuffle.
// Every family's tile has the verbs below; op files know no others.
#pragma once

#include "instructions.cuh"
#include "launch.cuh"

namespace evit::cuda {

// Fragments of 16x16 numbers; the product is the family's.
template <typename T>
struct TileOfRows {
  using Number = T;
  struct Fragment {
    u32 r[4];
  };
  struct Accumulator {
    float d[8];
  };
  // Lanes whose numbers are masked in these bits of the lane hold the same rows of an accumulator.
  static constexpr int kRowLanes[2] = {1, 2};
  static constexpr bool kAccumulatorIsOperand = true;
  static constexpr int kPacked = 256;  // numbers of a packed tile

  // First of the four neighbouring columns, and the two rows (half 0, 1), that a lane owns.
  EVIT_DEVICE static int column() { return (lane_id() & 3) * 4; }
  EVIT_DEVICE static int row(int half) { return (lane_id() >> 2) + half * 8; }
  // Where an accumulator holds (row(half), column() + j).
  EVIT_HOST_DEVICE static int at(int half, int j) { return half * 2 + (j & 1) + (j >> 1) * 4; }

  // 16 rows of 16 numbers in shared memory.
  EVIT_DEVICE static void load_a(Fragment& f, const T* rows, int stride) {
    const T* p = rows + (lane_id() >> 2) * stride + column();
    const u32x2 top = load_u32x2(p), bottom = load_u32x2(p + 8 * stride);
    f.r[0] = top.x, f.r[1] = bottom.x, f.r[2] = top.y, f.r[3] = bottom.y;
  }
  EVIT_DEVICE static void load_b(Fragment& f, const T* rows, int stride) {
    const int n = lane_id() >> 2;  // of an 8-wide product; the second has the columns 2 further
    const T* p = rows + ((n & 1) + (n >> 1) * 4) * stride + column();
    const u32x2 left = load_u32x2(p), right = load_u32x2(p + 2 * stride);
    f.r[0] = left.x, f.r[1] = left.y, f.r[2] = right.x, f.r[3] = right.y;
  }
  // A tile that `pack_tiles` laid out: what a lane loads is 16 bytes, a warp 512 in a row.
  EVIT_DEVICE static void load_packed_a(Fragment& f, const T* tile) {
    const u32x4 v = load_u32x4(tile + lane_id() * 8);
    f.r[0] = v.x, f.r[1] = v.z, f.r[2] = v.y, f.r[3] = v.w;
  }
  EVIT_DEVICE static void load_packed_b(Fragment& f, const T* tile) {
    const u32x4 v = load_u32x4(tile + lane_id() * 8);
    f.r[0] = v.x, f.r[1] = v.y, f.r[2] = v.z, f.r[3] = v.w;
  }
  // An accumulator as the A operand of the next product: its columns are that one's k.
  EVIT_DEVICE static void from_accumulator(Fragment& f, const Accumulator& c) {
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      f.r[half] = pack2<T>(c.d[at(half, 0)], c.d[at(half, 1)]);
      f.r[half + 2] = pack2<T>(c.d[at(half, 2)], c.d[at(half, 3)]);
    }
  }
};

template <typename T>
struct TileSm80 : TileOfRows<T> {
  static constexpr int kFamily = 80;
  using typename TileOfRows<T>::Fragment;
  using typename TileOfRows<T>::Accumulator;
  EVIT_DEVICE static void mma(Accumulator& c, const Fragment& a, const Fragment& b) {
    mma_m16n8k16<T>(c.d, a.r, b.r);
    mma_m16n8k16<T>(c.d + 4, a.r, b.r + 2);
  }
};

}  // namespace evit::cuda
