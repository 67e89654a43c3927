// Average pool, then one linear layer, in CUDA. Meaning: evit_fast/ops/classifier.py.
//
// `linear`: one block = `rows` images x `tiles` tiles of 16 classes; `chunk` channels at a time.
// Shared memory: their means, T [rows][chunk]. Where `fused`, the block pools its images itself:
// with few images every block of classes does so again (12 KiB an image, from L2, while the first
// weights are on their way), and one launch is enough. Else `pool` has written the means, T [B, C].
//
// `pool`: one thread = 8 channels of one image. With N = 0 it writes the result.
//
// Tokens are summed in float32, in chunks of 8 and those in order; the linear layer's sums run over
// the channels in order. Results depend neither on B nor on how the work is shared.
#pragma once

#include "launch.cuh"

#if defined(EVIT_DEVICE_CODE)
#include "ahead.cuh"
#include "instructions.cuh"
#endif

namespace evit::cuda {

struct ClassifierSizes {
  int C, N;
  int fused;
  int rows, warps, tiles;  // of a block: images, a multiple of 16; tiles of 16 classes
  int chunk;               // channels in shared memory; divides C
  int x_kind, y_kind;      // kFloat32, ..
};

constexpr int kClassifierPoolThreads = 128;

EVIT_HOST_DEVICE int classifier_stride(int family, int n) {
  return family == 0 ? n + 4 : row_stride(family, n);
}

template <typename T>
struct ClassifierLinearArgs {
  void* y;            // [B, N] of y_kind
  const void* x;      // fused: [B, tokens, C] of x_kind; else T [B, C]
  const T* w;         // packed [N up to 16][C]
  const float* bias;  // [N up to 16]
  i64 B, tokens;
};

struct ClassifierPoolArgs {
  void* y;        // [B, C] of y_kind
  const void* x;  // [B, tokens, C] of x_kind
  i64 B, tokens;
};

#if defined(EVIT_DEVICE_CODE)
template <typename Tile, ClassifierSizes S>
struct ClassifierKernel {
  using T = typename Tile::Number;
  using X = typename NumberOf<S.x_kind>::Type;
  using Y = typename NumberOf<S.y_kind>::Type;
  using Args = ClassifierLinearArgs<T>;

  static constexpr int kThreads = S.warps * 32;
  static constexpr int MT = S.rows / 16, NT = (S.N + 15) / 16, KT = S.chunk / 16;
  static constexpr int kStride = classifier_stride(Tile::kFamily, S.chunk);
  static constexpr int kWarpRows = MT > 1 ? 2 : 1, M = MT / kWarpRows;
  static constexpr int kWarpColumns = S.warps / kWarpRows;
  static constexpr int kGroup = (S.tiles + kWarpColumns - 1) / kWarpColumns;
  static_assert(M * kGroup * 8 <= 96, "the sums leave no registers; fewer tiles");
  static_assert(S.C % S.chunk == 0 && S.chunk % 16 == 0);

  EVIT_DEVICE static void linear(const Args& p) {
    const i64 first = static_cast<i64>(block_x()) * S.rows;
    const int begin = block_y() * S.tiles, end = begin + S.tiles < NT ? begin + S.tiles : NT;
    const int warp_row = warp_id() % kWarpRows * M * 16;
    AheadProduct<Tile, M, kGroup, kWarpColumns, S.C / 16, steps_ahead<Tile>(KT, kGroup)> product;
    product.start(p.w, begin + warp_id() / kWarpRows, end);
    T* s_rows = reinterpret_cast<T*>(shared_memory());
    for (int c = 0; c < S.C; c += S.chunk) {
      if (c > 0) sync_block();  // the chunk before is used
      load_rows(p, first, c, s_rows);
      sync_block();
      product.template add<KT>(s_rows + warp_row * kStride, kStride, c / 16);
    }
    product.each([&](int row, int column, const typename Tile::Accumulator& c) {
      store(p, first + warp_row + row, column + Tile::column(), c);
    });
  }

  EVIT_DEVICE static void pool(const ClassifierPoolArgs& p) {
    const i64 i = static_cast<i64>(block_x()) * kClassifierPoolThreads + thread_id();
    if (i >= p.B * (S.C / 8)) return;
    const i64 image = i / (S.C / 8);
    const int c = static_cast<int>(i % (S.C / 8)) * 8;
    float value[8];
    mean(static_cast<const X*>(p.x) + image * p.tokens * S.C + c, p.tokens, value);
    store_8(static_cast<Y*>(p.y) + image * S.C + c, value);
  }

 private:
  // s_rows [rows][chunk]: channels c, c + 1, .. of the images from `first` on. Rows past the last
  // image keep what they hold: no sum that is stored reads them.
  EVIT_DEVICE static void load_rows(const Args& p, i64 first, int c, T* s_rows) {
    constexpr int kWidth = S.fused ? 8 : 16 / sizeof(T), kPieces = S.chunk / kWidth;
    for (int i = thread_id(); i < S.rows * kPieces; i += kThreads) {
      const int row = i / kPieces, column = i % kPieces * kWidth;
      const i64 image = first + row;
      T* to = s_rows + row * kStride + column;
      if constexpr (S.fused) {
        if (image >= p.B) break;  // and so are all further rows
        float value[8];
        mean(static_cast<const X*>(p.x) + image * p.tokens * S.C + c + column, p.tokens, value);
        store_8(to, value);
      } else {
        const bool inside = image < p.B;
        const T* from = static_cast<const T*>(p.x) + (inside ? image * S.C + c + column : 0);
        copy_async(to, from, inside);
      }
    }
    if constexpr (!S.fused) {
      commit_copies();
      wait_copies<0>();
    }
  }

  // Of eight channels; x: those of the first token.
  EVIT_DEVICE static void mean(const X* x, i64 tokens, float* value) {
    float total[8] = {};
    i64 t = 0;
    for (; t + 8 <= tokens; t += 8) add<8>(x + t * S.C, 8, total);
    if (t < tokens) add<7>(x + t * S.C, static_cast<int>(tokens - t), total);
    const float count = static_cast<float>(tokens);
    EVIT_UNROLL
    for (int j = 0; j < 8; j++) value[j] = total[j] / count;
  }
  // total += the sum of `count` tokens, at most MOST.
  template <int MOST>
  EVIT_DEVICE static void add(const X* x, int count, float* total) {
    float sum[8] = {};
    EVIT_UNROLL
    for (int t = 0; t < MOST; t++) {
      if (t >= count) continue;
      float token[8];
      load_numbers<8>(token, x + t * S.C);
      EVIT_UNROLL
      for (int j = 0; j < 8; j++) sum[j] += token[j];
    }
    EVIT_UNROLL
    for (int j = 0; j < 8; j++) total[j] += sum[j];
  }

  EVIT_DEVICE static void store(const Args& p, i64 first, int n,
                                const typename Tile::Accumulator& c) {
    float bias[4];
    load_numbers<4>(bias, p.bias + n);
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const i64 image = first + Tile::row(half);
      if (image >= p.B) continue;
      Y* y = static_cast<Y*>(p.y) + image * S.N + n;
      float value[4];
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) value[j] = c.d[Tile::at(half, j)] + bias[j];
      if constexpr (S.N % 4 == 0) {
        if (n < S.N) store_4(y, value);
      } else {
        EVIT_UNROLL
        for (int j = 0; j < 4; j++) {
          if (n + j < S.N) y[j] = Number<Y>::from(value[j]);
        }
      }
    }
  }
};
#endif

EVIT_HOST_DEVICE LaunchShape classifier_linear_launch(const ClassifierSizes& s, int family, i64 B,
                                                      i64, i64) {
  return {ceil_div(B, s.rows), ceil_div(s.N, 16 * s.tiles), s.warps * 32,
          s.rows * classifier_stride(family, s.chunk) * number_bytes(family)};
}
EVIT_HOST_DEVICE LaunchShape classifier_pool_launch(const ClassifierSizes& s, int, i64 B, i64,
                                                    i64) {
  return {ceil_div(B * s.C, 8 * kClassifierPoolThreads), 1, kClassifierPoolThreads, 0};
}

}  // namespace evit::cuda
