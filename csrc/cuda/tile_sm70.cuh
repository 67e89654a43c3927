// 16x16x16 products of float16 on one warp, on sm_70: mma.m8n8k4, four k at a time. The verbs are
// those of tile_sm80.cuh.
//
// One instruction is four 8x8 products, one per quad pair: they tile 16x16, two by two. Rows of the
// two pairs are interleaved by 4, so that eight neighbouring lanes read eight neighbouring rows:
// with a row stride that is an odd multiple of 16 bytes, 16-byte loads meet no bank twice. Columns
// are permuted so that a lane owns four neighbouring ones.
#pragma once

#include "instructions.cuh"
#include "launch.cuh"

namespace evit::cuda {

struct TileSm70 {
  static constexpr int kFamily = 70;
  using Number = f16;
  struct Fragment {
    u32 r[8];
  };
  struct Accumulator {
    float d[8];
  };
  static constexpr int kRowLanes[2] = {2, 8};
  static constexpr bool kAccumulatorIsOperand = false;
  static constexpr int kPacked = 256;

  EVIT_DEVICE static int column() {
    const int lane = lane_id();
    return (lane >> 1 & 1) * 4 + (lane >> 3 & 1) * 8;
  }
  EVIT_DEVICE static int row(int half) {
    const int lane = lane_id();
    return (lane & 1) + half * 2 + (lane >> 2 & 1) * 4 + (lane >> 4) * 8;
  }
  EVIT_HOST_DEVICE static int at(int half, int j) { return half * 2 + (j & 1) + (j >> 1) * 4; }

  EVIT_DEVICE static void load_a(Fragment& f, const f16* rows, int stride) {
    load(f, rows + a_row() * stride, 8);
  }
  EVIT_DEVICE static void load_b(Fragment& f, const f16* rows, int stride) {
    const int lane = lane_id();
    const int column = (lane & 1) + (lane >> 1 & 1) * 4 + (lane >> 3 & 1) * 8 + (lane >> 4) * 2;
    load(f, rows + column * stride, 8);
  }
  EVIT_DEVICE static void load_packed_a(Fragment& f, const f16* tile) {
    load(f, tile + a_row() * 8, 128);
  }
  EVIT_DEVICE static void load_packed_b(Fragment& f, const f16* tile) {
    const int lane = lane_id();
    load(f, tile + ((lane & 3) + (lane >> 3 & 1) * 4 + (lane >> 4) * 8) * 8, 128);
  }
  EVIT_DEVICE static void from_accumulator(Fragment&, const Accumulator&) { trap(); }

  EVIT_DEVICE static void mma(Accumulator& c, const Fragment& a, const Fragment& b) {
    EVIT_UNROLL
    for (int k = 0; k < 4; k++) mma_m8n8k4(c.d, a.r + 2 * k, b.r + 2 * k);
  }

 private:
  EVIT_DEVICE static int a_row() { return (lane_id() & 7) + (lane_id() >> 4) * 8; }
  // 16 numbers of one row, in two halves `apart` numbers from each other.
  EVIT_DEVICE static void load(Fragment& f, const f16* p, int apart) {
    const u32x4 first = load_u32x4(p), second = load_u32x4(p + apart);
    f.r[0] = first.x, f.r[1] = first.y, f.r[2] = first.z, f.r[3] = first.w;
    f.r[4] = second.x, f.r[5] = second.y, f.r[6] = second.z, f.r[7] = second.w;
  }
};

}  // namespace evit::cuda
