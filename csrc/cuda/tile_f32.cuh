// 16x16x16 products of float32 on one warp, on any architecture: multiply-adds, no tensor core. The
// verbs are those of tile_sm80.cuh. A fragment is where its numbers lie: the product reads them.
#pragma once

#include "instructions.cuh"
#include "launch.cuh"

namespace evit::cuda {

struct TileF32 {
  static constexpr int kFamily = 0;
  using Number = float;
  struct Fragment {
    const float* rows;
    int stride;
  };
  struct Accumulator {
    float d[8];
  };
  static constexpr int kRowLanes[2] = {1, 2};
  static constexpr bool kAccumulatorIsOperand = false;
  static constexpr int kPacked = 256;

  EVIT_DEVICE static int column() { return (lane_id() & 3) * 4; }
  EVIT_DEVICE static int row(int half) { return (lane_id() >> 2) + half * 8; }
  EVIT_HOST_DEVICE static int at(int half, int j) { return half * 4 + j; }

  EVIT_DEVICE static void load_a(Fragment& f, const float* rows, int stride) { f = {rows, stride}; }
  EVIT_DEVICE static void load_b(Fragment& f, const float* rows, int stride) { f = {rows, stride}; }
  EVIT_DEVICE static void load_packed_a(Fragment& f, const float* tile) { f = {tile, 16}; }
  EVIT_DEVICE static void load_packed_b(Fragment& f, const float* tile) { f = {tile, 16}; }
  EVIT_DEVICE static void from_accumulator(Fragment&, const Accumulator&) { trap(); }

  EVIT_DEVICE static void mma(Accumulator& c, const Fragment& a, const Fragment& b) {
    for (int k = 0; k < 16; k += 4) {
      f32x4 x[2], w[4];
      EVIT_UNROLL
      for (int half = 0; half < 2; half++) x[half] = load_f32x4(a.rows + row(half) * a.stride + k);
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) w[j] = load_f32x4(b.rows + (column() + j) * b.stride + k);
      EVIT_UNROLL
      for (int half = 0; half < 2; half++) {
        EVIT_UNROLL
        for (int j = 0; j < 4; j++) {
          float& d = c.d[at(half, j)];
          d += x[half].x * w[j].x;
          d += x[half].y * w[j].y;
          d += x[half].z * w[j].z;
          d += x[half].w * w[j].w;
        }
      }
    }
  }
};

}  // namespace evit::cuda
