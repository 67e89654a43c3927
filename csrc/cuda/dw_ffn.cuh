// y = x + dw(x), then y + w2 relu(w1 y), in CUDA. Meaning: evit_fast/ops/dw_ffn.py.
//
// `ffn`: one block = `tokens` consecutive tokens (rows of the map, images in a row), all C
// channels, its share of the hidden units. In shared memory: y [tokens][C] and a block of hidden
// activations [tokens][kHidden], twice, so that one barrier a step is enough. The sum over the
// hidden units stays in registers: C / 16 / kColumns x row tiles x 8 floats a lane. Hidden
// activations never leave the block. Grid (tokens / block, split).
//
// With split > 1 a block takes 1/split of the hidden units and writes a partial sum in float32;
// `sum` adds them in order. One SM draws weights from L2 at some 64 bytes a clock: where an image
// has 16 tokens, that is what puts more SMs to work.
#pragma once

#include "launch.cuh"

#if defined(EVIT_DEVICE_CODE)
#include "gemm.cuh"
#endif

namespace evit::cuda {

struct DwFfnSizes {
  int C, F;
  int tokens;  // of a block, a multiple of 16
  int warps, split;
  int x_kind, y_kind;  // kFloat32, ..
};

constexpr int kDwFfnHidden = 64;  // units of a step; F is packed in multiples of it

struct DwFfnMemory {  // bytes from the start of shared memory
  int y, hidden, hidden_bytes, end;
};
EVIT_HOST_DEVICE DwFfnMemory dw_ffn_memory(const DwFfnSizes& s, int family) {
  const int y_bytes = s.tokens * row_stride(family, s.C) * number_bytes(family);
  const int hidden_bytes = s.tokens * row_stride(family, kDwFfnHidden) * number_bytes(family);
  return {0, y_bytes, hidden_bytes, y_bytes + 2 * hidden_bytes};
}

// Pointers and sizes of a launch; every field has 8 bytes.
template <typename T>
struct DwFfnArgs {
  void* y;               // [T, C] of y_kind; split > 1: float32 [split, T, C]
  const void* x;         // [T, C] of x_kind
  const float* dw;       // [9, C]
  const float* dw_bias;  // [C]
  const T* w1;           // packed [FP / 16][C / 16]
  const float* b1;       // [FP]
  const T* w2;           // packed [C / 16][FP / 16]
  const float* b2;       // [C]
  i64 B, H, W;
};

struct DwFfnSumArgs {
  void* y;            // [count] of y_kind
  const float* part;  // [split, count]
  i64 count;          // T * C
};
constexpr int kDwFfnSumThreads = 256;

#if defined(EVIT_DEVICE_CODE)
template <typename Tile, DwFfnSizes S>
struct DwFfnKernel {
  using T = typename Tile::Number;
  using X = typename NumberOf<S.x_kind>::Type;
  using Y = typename NumberOf<S.split == 1 ? S.y_kind : kFloat32>::Type;
  static constexpr int kThreads = S.warps * 32, MT = S.tokens / 16, CT = S.C / 16;
  static constexpr int kHT = kDwFfnHidden / 16;  // column tiles of a step
  static constexpr int kSteps = (S.F + kDwFfnHidden - 1) / kDwFfnHidden;
  static constexpr int kStepsOfShare = (kSteps + S.split - 1) / S.split;
  static constexpr int kStrideY = row_stride(Tile::kFamily, S.C);
  static constexpr int kStrideH = row_stride(Tile::kFamily, kDwFfnHidden);
  using Grid = WarpGrid<S.warps, MT>;
  static constexpr int kGroup = (CT + Grid::kColumns - 1) / Grid::kColumns;
  static_assert(kGroup * Grid::kRowTiles * 8 <= 128, "the sums leave no registers; more warps");

  EVIT_DEVICE static void ffn(const DwFfnArgs<T>& p) {
    constexpr DwFfnMemory kMemory = dw_ffn_memory(S, Tile::kFamily);
    T* s_y = reinterpret_cast<T*>(shared_memory() + kMemory.y);
    const i64 first = static_cast<i64>(block_x()) * S.tokens;
    depthwise(p, first, s_y);
    typename Tile::Accumulator sum[kGroup][Grid::kRowTiles];
    clear(sum);
    sync_block();

    const int begin = block_y() * kStepsOfShare;
    const int end = begin + kStepsOfShare < kSteps ? begin + kStepsOfShare : kSteps;
    const int n0 = warp_id() / Grid::kRows;
    for (int step = begin; step < end; step++) {
      T* s_h = reinterpret_cast<T*>(shared_memory() + kMemory.hidden +
                                    (step & 1) * kMemory.hidden_bytes);
      hidden(p, step, s_y, s_h);
      sync_block();  // the other half of s_h is free: everyone has passed the step before
      multiply_into<Tile, S.warps, MT, kHT, kGroup>(
          sum, s_h, kStrideH, p.w2 + step * kHT * Tile::kPacked, kSteps * kHT, n0, CT);
    }
    store(p, first, s_y, sum, n0);
  }

  EVIT_DEVICE static void sum(const DwFfnSumArgs& p) {
    using Out = typename NumberOf<S.y_kind>::Type;
    const i64 i = (static_cast<i64>(block_x()) * kDwFfnSumThreads + thread_id()) * 4;
    if (i >= p.count) return;
    float total[4] = {0, 0, 0, 0};
    EVIT_UNROLL
    for (int share = 0; share < S.split; share++) {
      float part[4];
      load_numbers<4>(part, p.part + share * p.count + i);
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) total[j] += part[j];
    }
    store_4(static_cast<Out*>(p.y) + i, total);
  }

 private:
  // s_y [tokens][C]: the 3x3 convolution with the residual in its centre tap; zeros past the end.
  // A tap outside the image adds nothing: its neighbours in memory are other images' tokens.
  EVIT_DEVICE static void depthwise(const DwFfnArgs<T>& p, i64 first, T* s_y) {
    constexpr int kChunks = S.C / 8;
    const i64 end = p.B * p.H * p.W;
    const X* x = static_cast<const X*>(p.x);
    for (int i = thread_id(); i < S.tokens * kChunks; i += kThreads) {
      const int t = i / kChunks, c = i % kChunks * 8;
      const i64 token = first + t;
      float y[8] = {};
      if (token < end) {
        load_numbers<8>(y, p.dw_bias + c);
        const int column = static_cast<int>(token % p.W);
        const int row = static_cast<int>(token / p.W % p.H);
        for (int dy = -1; dy <= 1; dy++) {
          if (row + dy < 0 || row + dy >= p.H) continue;
          for (int dx = -1; dx <= 1; dx++) {
            if (column + dx < 0 || column + dx >= p.W) continue;
            float value[8], tap[8];
            load_numbers<8>(value, x + (token + dy * p.W + dx) * S.C + c);
            load_numbers<8>(tap, p.dw + ((dy + 1) * 3 + dx + 1) * S.C + c);
            EVIT_UNROLL
            for (int j = 0; j < 8; j++) y[j] += value[j] * tap[j];
          }
        }
      }
      store_8(s_y + t * kStrideY + c, y);
    }
  }

  // s_h [tokens][kHidden] = relu(y w1 + b1) of one step.
  EVIT_DEVICE static void hidden(const DwFfnArgs<T>& p, int step, const T* s_y, T* s_h) {
    const float* b1 = p.b1 + step * kDwFfnHidden;
    multiply<Tile, S.warps, MT, CT, 1>(
        s_y, kStrideY, p.w1 + step * kHT * CT * Tile::kPacked, kHT,
        [&](int row, int column, const typename Tile::Accumulator& c) {
          float bias[4];
          load_numbers<4>(bias, b1 + column + Tile::column());
          EVIT_UNROLL
          for (int half = 0; half < 2; half++) {
            float h[4];
            EVIT_UNROLL
            for (int j = 0; j < 4; j++) h[j] = relu(c.d[Tile::at(half, j)] + bias[j]);
            store_4(s_h + (row + Tile::row(half)) * kStrideH + column + Tile::column(), h);
          }
        });
  }

  template <typename Sum>
  EVIT_DEVICE static void store(const DwFfnArgs<T>& p, i64 first, const T* s_y, const Sum& sum,
                                int n0) {
    const i64 end = p.B * p.H * p.W;
    Y* y = static_cast<Y*>(p.y) + block_y() * end * S.C;
    store_tiles<S.warps, MT>(sum, n0, CT,
                             [&](int row, int column, const typename Tile::Accumulator& c) {
                               column += Tile::column();
                               float bias[4];
                               load_numbers<4>(bias, p.b2 + column);
                               EVIT_UNROLL
                               for (int half = 0; half < 2; half++) {
                                 const int t = row + Tile::row(half);
                                 if (first + t >= end) continue;
                                 float residual[4], out[4];
                                 load_numbers<4>(residual, s_y + t * kStrideY + column);
                                 EVIT_UNROLL
                                 for (int j = 0; j < 4; j++) {
                                   out[j] = c.d[Tile::at(half, j)];
                                   if (block_y() == 0) out[j] += bias[j] + residual[j];
                                 }
                                 store_4(y + (first + t) * S.C + column, out);
                               }
                             });
  }
};
#endif

EVIT_HOST_DEVICE LaunchShape dw_ffn_ffn_launch(const DwFfnSizes& s, int family, i64 B, i64 H,
                                               i64 W) {
  return {ceil_div(B * H * W, s.tokens), s.split, s.warps * 32, dw_ffn_memory(s, family).end};
}
EVIT_HOST_DEVICE LaunchShape dw_ffn_sum_launch(const DwFfnSizes& s, int, i64 B, i64 H, i64 W) {
  return {ceil_div(B * H * W * s.C, kDwFfnSumThreads * 4), 1, kDwFfnSumThreads, 0};
}

}  // namespace evit::cuda
