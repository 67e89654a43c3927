// What both forms of patch_merge do first, tile by tile and step by step: h = relu(w1 x + b1) of
// the tokens that a tile reads, in shared memory, then g = relu(3x3 depthwise of stride 2 (h)) and
// the sums of its channels.
//
// A thread has four channels; `kSharers` threads share the outputs of a tile. What each has summed
// is added in their order, tile after tile: the mean does not depend on the batch.
#pragma once

#include "gemm.cuh"
#include "instructions.cuh"
#include "patch_merge_sizes.cuh"

namespace evit::cuda {

// A tile of one map, or of several whole ones.
struct PatchMergeRegion {
  i64 image;  // the first
  int images;
  int row, column, rows, columns;  // outputs of a map
  int y, x, height, width;         // the tokens of a map that they read

  EVIT_DEVICE static PatchMergeRegion of(const PatchMergeTiling& t, int tile, i64 first, i64 end,
                                         i64 H, i64 W) {
    const int h = static_cast<int>(H), w = static_cast<int>(W), tiles = t.down * t.across;
    PatchMergeRegion r;
    r.image = first + static_cast<i64>(tile / tiles) * t.images;
    r.images = end - r.image < t.images ? static_cast<int>(end - r.image) : t.images;
    side(tile % tiles / t.across * t.rows, t.rows, h, &r.row, &r.rows, &r.y, &r.height);
    side(tile % t.across * t.columns, t.columns, w, &r.column, &r.columns, &r.x, &r.width);
    return r;
  }

 private:
  // From output `from`, at most `count`, along a side of n tokens.
  EVIT_DEVICE static void side(int from, int count, int n, int* output, int* outputs, int* token,
                               int* tokens) {
    const int rest = (n + 1) / 2 - from;
    *output = from;
    *outputs = rest < count ? rest : count;
    *token = from == 0 ? 0 : 2 * from - 1;
    const int end = 2 * (from + *outputs);
    *tokens = (end < n ? end : n) - *token;
  }
};

template <typename A, typename B>
struct PatchMergeSame {
  static constexpr bool kSame = false;
};
template <typename A>
struct PatchMergeSame<A, A> {
  static constexpr bool kSame = true;
};

template <typename Tile, PatchMergeSizes S, bool kWhole>
struct PatchMergeHidden {
  using T = typename Tile::Number;
  using X = typename NumberOf<S.x_kind>::Type;
  static constexpr int kFamily = Tile::kFamily, kThreads = S.warps * 32;
  static constexpr int MT = S.tokens / 16, CT = S.C / 16, FT = S.F / 16;
  static constexpr int kStepTiles = S.hidden / 16, kSteps = (S.F + S.hidden - 1) / S.hidden;
  static constexpr int kStrideX = row_stride(kFamily, S.C);
  static constexpr int kStrideH = row_stride(kFamily, S.hidden);
  static constexpr PatchMergeMemory kMemory = patch_merge_memory(S, kFamily, kWhole);
  using Grid = WarpGrid<S.warps, MT>;
  static constexpr int kGroup = (kStepTiles + Grid::kColumns - 1) / Grid::kColumns;
  static constexpr bool kAsItIs = PatchMergeSame<X, T>::kSame;
  static constexpr int kQuads = S.hidden / 4, kSharers = kThreads / kQuads;
  static_assert(kThreads % kQuads == 0 && kSharers > 0, "every thread has four channels");
  static_assert(kGroup * Grid::kRowTiles <= 8, "more sums than the registers hold");

  EVIT_DEVICE static T* shared(int at) { return reinterpret_cast<T*>(shared_memory() + at); }
  EVIT_DEVICE static float* shared_floats(int at) {
    return reinterpret_cast<float*>(shared_memory() + at);
  }

  // x of a region's tokens [tokens][C]; zeros behind them. Ends without a barrier.
  EVIT_DEVICE static void load_x(const PatchMergeRegion& r, const void* g_x, i64 H, i64 W) {
    constexpr int kWidth = kAsItIs ? 16 / sizeof(T) : 8;
    const X* x = static_cast<const X*>(g_x);
    T* s_x = shared(kMemory.x);
    const int map = r.height * r.width;
    for (int row = warp_id(); row < S.tokens; row += S.warps) {
      const int i = row / map, at = row % map;
      const bool inside = i < r.images;
      const i64 token = ((r.image + i) * H + r.y + at / r.width) * W + r.x + at % r.width;
      const X* from = x + (inside ? token : 0) * S.C;
      for (int c = lane_id() * kWidth; c < S.C; c += 32 * kWidth) {
        if constexpr (kAsItIs) {
          copy_async(s_x + row * kStrideX + c, from + c, inside);
        } else {
          float value[8] = {};
          if (inside) load_numbers<8>(value, from + c);
          store_8(s_x + row * kStrideX + c, value);
        }
      }
    }
    commit_copies();
    wait_copies<0>();
  }

  // h [tokens][hidden] of one step. Padding rows are as if x were zero; nobody reads them.
  EVIT_DEVICE static void hidden(const T* EVIT_RESTRICT w1, const float* EVIT_RESTRICT b1,
                                 int step) {
    T* s_h = shared(kMemory.h);
    const int first = step * kStepTiles, tiles = FT - first < kStepTiles ? FT - first : kStepTiles;
    multiply<Tile, S.warps, MT, CT, kGroup>(
        shared(kMemory.x), kStrideX, w1 + first * CT * Tile::kPacked, tiles,
        [&](int row, int column, const typename Tile::Accumulator& c) {
          float bias[4];
          load_numbers<4>(bias, b1 + first * 16 + column + Tile::column());
          EVIT_UNROLL
          for (int half = 0; half < 2; half++) {
            float h[4];
            EVIT_UNROLL
            for (int j = 0; j < 4; j++) h[j] = relu(c.d[Tile::at(half, j)] + bias[j]);
            store_4(s_h + (row + Tile::row(half)) * kStrideH + column + Tile::column(), h);
          }
        });
  }

  // g of one step, and each thread's sums to `parts`. g [images of the region][OH][OW] rows of
  // `stride` numbers. Taps outside the map are left out: an infinity there would become NaN.
  EVIT_DEVICE static void depthwise(const PatchMergeRegion& r, const float* EVIT_RESTRICT dw,
                                    const float* EVIT_RESTRICT dw_bias, int step, T* g, int stride,
                                    int OH, int OW) {
    const int c = thread_id() % kQuads * 4, sharer = thread_id() / kQuads;
    const int f = step * S.hidden + c;
    if (f >= S.F) return;
    const T* s_h = shared(kMemory.h) + c;
    float tap[9][4], bias[4];
    EVIT_UNROLL
    for (int i = 0; i < 9; i++) load_numbers<4>(tap[i], dw + i * S.F + f);
    load_numbers<4>(bias, dw_bias + f);
    for (int i = 0; i < r.images; i++) {
      float sum[4] = {0, 0, 0, 0};
      for (int o = sharer; o < r.rows * r.columns; o += kSharers) {
        const int row = r.row + o / r.columns, column = r.column + o % r.columns;
        const int y = 2 * row - 1 - r.y, x = 2 * column - 1 - r.x;  // the first tap, in the region
        float out[4];
        EVIT_UNROLL
        for (int j = 0; j < 4; j++) out[j] = bias[j];
        EVIT_UNROLL
        for (int dy = 0; dy < 3; dy++) {
          if (y + dy < 0 || y + dy >= r.height) continue;
          EVIT_UNROLL
          for (int dx = 0; dx < 3; dx++) {
            if (x + dx < 0 || x + dx >= r.width) continue;
            float h[4];
            load_numbers<4>(h, s_h + ((i * r.height + y + dy) * r.width + x + dx) * kStrideH);
            EVIT_UNROLL
            for (int j = 0; j < 4; j++) out[j] += h[j] * tap[dy * 3 + dx][j];
          }
        }
        EVIT_UNROLL
        for (int j = 0; j < 4; j++) {
          out[j] = relu(out[j]);
          sum[j] += out[j];
        }
        store_4(g + (static_cast<i64>(i * OH + row) * OW + column) * stride + f, out);
      }
      store_4(shared_floats(kMemory.parts) + (i * kSharers + sharer) * S.hidden + c, sum);
    }
  }

  // put(image of the region, channel, sum over the region) for the channels of one step.
  template <typename Put>
  EVIT_DEVICE static void sum_parts(const PatchMergeRegion& r, int step, Put put) {
    const float* parts = shared_floats(kMemory.parts);
    for (int k = thread_id(); k < r.images * S.hidden; k += kThreads) {
      const int i = k / S.hidden, c = k % S.hidden, f = step * S.hidden + c;
      if (f >= S.F) continue;
      float sum = 0;
      for (int sharer = 0; sharer < kSharers; sharer++) {
        sum += parts[(i * kSharers + sharer) * S.hidden + c];
      }
      put(i, f, sum);
    }
  }
};

}  // namespace evit::cuda
