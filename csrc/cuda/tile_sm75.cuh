// 16x16x16 products of float16 on one warp, on sm_75: mma.m16n8k8, twice for 16 k. The fragments
// are those of sm_80: its registers are those of two products of eight k.
#pragma once

#include "tile_sm80.cuh"

namespace evit::cuda {

struct TileSm75 : TileOfRows<f16> {
  static constexpr int kFamily = 75;
  EVIT_DEVICE static void mma(Accumulator& c, const Fragment& a, const Fragment& b) {
    EVIT_UNROLL
    for (int step = 0; step < 2; step++) {
      mma_m16n8k8(c.d, a.r + 2 * step, b.r + step);
      mma_m16n8k8(c.d + 4, a.r + 2 * step, b.r + 2 + step);
    }
  }
};

}  // namespace evit::cuda
