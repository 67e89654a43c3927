// patch_merge in CUDA: h = relu(w1 x + b1), g = relu(3x3 depthwise of stride 2 (h)), the gate of
// squeeze-excite from the means of g, y = w3 (g * gate) + b3. Meaning:
// evit_fast/ops/patch_merge.py.
//
// `whole`: one block = `images` images. For every tile of a map (at 224 x 224 pixels a half of it,
// or two whole ones) x is loaded once; for every `hidden` channels of the F = 4 C: their product
// with x, the convolution, a barrier after each. g stays in shared memory in the type of the
// products, so squeeze-excite costs no pass over a stored map: sums are a by-product of the
// convolution, the gate multiplies g where it lies (every number once; at the load of an operand it
// would be once for each column of warps), and the last product reads it. In shared memory:
//
//   g         T [images * outputs][F]   49 outputs, F = 768: 75 KiB; 16, F = 1152: 36 KiB
//   x         T [tokens][C]             112 tokens, C = 192: 46 KiB
//   h         T [tokens][hidden]        112 tokens, hidden = 128: 32 KiB
//   parts     float [images of a tile][threads][4]
//   sums      float [images][F]         then the gate
//   squeezed  float [images][R]
//
// Where that does not fit, where the map has more outputs, and where the images are too few to give
// every SM a block, four launches:
//   `hidden`   one block = one tile x `steps` of the steps above. g and a tile's sums go to memory.
//   `squeeze`, `excite`  one block = `group` images x some rows of se1, se2.
//   `project`  one block = `rows` outputs, images in a row, x 1/split of CO. g gets its gate on the
//              way into shared memory, [2][rows][chunk]: one barrier a step; the sums stay in
//              registers.
// Sums over k, over a map and over parts have an order that the batch has no part in.
#pragma once

#include "patch_merge_sizes.cuh"

#if defined(EVIT_DEVICE_CODE)
#include "gemm.cuh"
#include "patch_merge_gate.cuh"
#include "patch_merge_hidden.cuh"

namespace evit::cuda {

template <typename Tile, PatchMergeSizes S>
struct PatchMergeKernel {
  using T = typename Tile::Number;
  using Y = typename NumberOf<S.y_kind>::Type;
  using Accumulator = typename Tile::Accumulator;
  static constexpr int kFamily = Tile::kFamily, kThreads = S.warps * 32;
  static constexpr int FT = S.F / 16, COT = S.CO / 16;
  // Tiles of output that a warp sums at once. sm_70's operands take twice the registers.
  static constexpr int kMostSums = kFamily == 70 ? 6 : 8;

  EVIT_DEVICE static void whole(const PatchMergeWholeArgs<T>& p) {
    using Hidden = PatchMergeHidden<Tile, S, true>;
    constexpr int kStride = row_stride(kFamily, S.F);
    T* s_g = Hidden::shared(Hidden::kMemory.g);
    float* s_sums = Hidden::shared_floats(Hidden::kMemory.sums);
    const i64 first = static_cast<i64>(block_x()) * S.images;
    const int images = p.B - first < S.images ? static_cast<int>(p.B - first) : S.images;
    const int OH = static_cast<int>(p.H + 1) / 2, OW = static_cast<int>(p.W + 1) / 2;
    const PatchMergeTiling t = patch_merge_tiling(S, p.H, p.W);
    const int tiles = (images + t.images - 1) / t.images * t.down * t.across;
    for (int tile = 0; tile < tiles; tile++) {
      const auto r = PatchMergeRegion::of(t, tile, first, first + images, p.H, p.W);
      const int before = static_cast<int>(r.image - first);
      Hidden::load_x(r, p.x, p.H, p.W);
      sync_block();
      for (int step = 0; step < Hidden::kSteps; step++) {
        Hidden::hidden(p.w1, p.b1, step);
        sync_block();
        Hidden::depthwise(r, p.dw, p.dw_bias, step, s_g + before * OH * OW * kStride, kStride, OH,
                          OW);
        sync_block();
        Hidden::sum_parts(r, step, [&](int i, int f, float sum) {
          float* total = s_sums + (before + i) * S.F + f;
          *total = r.row == 0 && r.column == 0 ? sum : *total + sum;
        });
      }
    }
    sync_block();
    excite_shared(p, s_sums, OH * OW);
    sync_block();
    apply_gate(s_g, s_sums, images, OH * OW);
    sync_block();
    project_shared(p, s_g, first * OH * OW, images * OH * OW);
  }

  EVIT_DEVICE static void hidden(const PatchMergeHiddenArgs<T>& p) {
    using Hidden = PatchMergeHidden<Tile, S, false>;
    const int OH = static_cast<int>(p.H + 1) / 2, OW = static_cast<int>(p.W + 1) / 2;
    const PatchMergeTiling t = patch_merge_tiling(S, p.H, p.W);
    const int tiles = t.down * t.across;
    const auto r = PatchMergeRegion::of(t, block_x(), 0, p.B, p.H, p.W);
    Hidden::load_x(r, p.x, p.H, p.W);
    sync_block();
    const int begin = block_y() * S.steps;
    const int end = begin + S.steps < Hidden::kSteps ? begin + S.steps : Hidden::kSteps;
    for (int step = begin; step < end; step++) {
      Hidden::hidden(p.w1, p.b1, step);
      sync_block();
      Hidden::depthwise(r, p.dw, p.dw_bias, step, p.g + r.image * OH * OW * S.F, S.F, OH, OW);
      sync_block();
      Hidden::sum_parts(r, step, [&](int i, int f, float sum) {
        p.sums[((r.image + i) * tiles + block_x() % tiles) * S.F + f] = sum;
      });
    }
  }

  // relu(se1 mean + se1_bias), where mean is over the parts of a map.
  EVIT_DEVICE static void squeeze(const PatchMergeDenseArgs<T>& p) {
    const float scale = 1.0f / static_cast<float>(p.count);
    dense<S.F, S.R>(p, [&](float sum, float bias) { return relu(sum * scale + bias); });
  }
  EVIT_DEVICE static void excite(const PatchMergeDenseArgs<T>& p) {
    dense<S.R, S.F>(p, [](float sum, float bias) { return sigmoid(sum + bias); });
  }

  EVIT_DEVICE static void project(const PatchMergeProjectArgs<T>& p) {
    constexpr int MT = S.rows / 16, kTiles = (COT + S.split - 1) / S.split;
    using Grid = WarpGrid<S.warps, MT>;
    constexpr int kGroup = (kTiles + Grid::kColumns - 1) / Grid::kColumns;
    constexpr int kChunk = patch_merge_chunk(S.F), kStride = row_stride(kFamily, kChunk);
    static_assert(kGroup * Grid::kRowTiles <= 12, "the sums leave no registers");
    const i64 first = static_cast<i64>(block_x()) * S.rows;
    const int begin = block_y() * kTiles, tiles = COT - begin < kTiles ? COT - begin : kTiles;
    const int n0 = warp_id() / Grid::kRows;
    Accumulator sum[kGroup][Grid::kRowTiles];
    clear(sum);
    for (int step = 0; step < S.F / kChunk; step++) {
      T* s_rows = reinterpret_cast<T*>(shared_memory()) + (step & 1) * S.rows * kStride;
      load_gated<kChunk, kStride>(p, first, step * kChunk, s_rows);
      sync_block();  // the other half is free: everyone has passed the step before
      multiply_into<Tile, S.warps, MT, kChunk / 16, kGroup>(
          sum, s_rows, kStride, p.w3 + (begin * FT + step * (kChunk / 16)) * Tile::kPacked, FT, n0,
          tiles);
    }
    const i64 count = p.B * p.outputs;
    store_tiles<S.warps, MT>(sum, n0, tiles, [&](int row, int column, const Accumulator& c) {
      store_output(p.y, p.b3, first + row, count, begin * 16 + column, c);
    });
  }

 private:
  // The gate of every image of the block, in place of the sums.
  EVIT_DEVICE static void excite_shared(const PatchMergeWholeArgs<T>& p, float* s_sums,
                                        int outputs) {
    using Hidden = PatchMergeHidden<Tile, S, true>;
    // Rows at a time: what gives a lane about 16 loads to wait for, and a warp at most 32 sums.
    constexpr int kMost = 16 / S.images;
    constexpr int kLines1 = S.F > 256 && kMost > 4 ? 4 : kMost;
    constexpr int kLines2 = S.R > 256 && kMost > 8 ? 8 : kMost;
    float* s_squeezed = Hidden::shared_floats(Hidden::kMemory.squeezed);
    const float scale = 1.0f / static_cast<float>(outputs);
    multiply_vectors<S.F, S.images, kLines1>(
        s_sums, p.se1, warp_id() * kLines1, S.warps * kLines1, S.R, [&](int r, int i, float sum) {
          s_squeezed[i * S.R + r] = relu(sum * scale + p.se1_bias[r]);
        });
    sync_block();
    multiply_vectors<S.R, S.images, kLines2>(
        s_squeezed, p.se2, warp_id() * kLines2, S.warps * kLines2, S.F,
        [&](int f, int i, float sum) { s_sums[i * S.F + f] = sigmoid(sum + p.se2_bias[f]); });
  }

  EVIT_DEVICE static void apply_gate(T* s_g, const float* s_gate, int images, int outputs) {
    constexpr int kStride = row_stride(kFamily, S.F);
    for (int row = warp_id(); row < images * outputs; row += S.warps) {
      const float* gate = s_gate + row / outputs * S.F;
      for (int f = lane_id() * 8; f < S.F; f += 256) {
        multiply_by(s_g + row * kStride + f, s_g + row * kStride + f, gate + f);
      }
    }
  }

  EVIT_DEVICE static void multiply_by(T* to, const T* from, const float* factors) {
    float value[8], factor[8];
    load_numbers<8>(value, from);
    load_numbers<8>(factor, factors);
    EVIT_UNROLL
    for (int j = 0; j < 8; j++) value[j] *= factor[j];
    store_8(to, value);
  }

  EVIT_DEVICE static void project_shared(const PatchMergeWholeArgs<T>& p, const T* s_g, i64 first,
                                         int rows) {
    constexpr int MT = patch_merge_output_rows(S) / 16;
    using Grid = WarpGrid<S.warps, MT>;
    constexpr int kAll = (COT + Grid::kColumns - 1) / Grid::kColumns;
    constexpr int kMost = kMostSums / Grid::kRowTiles > 1 ? kMostSums / Grid::kRowTiles : 1;
    multiply<Tile, S.warps, MT, FT, (kAll < kMost ? kAll : kMost)>(
        s_g, row_stride(kFamily, S.F), p.w3, COT, [&](int row, int column, const Accumulator& c) {
          store_output(p.y, p.b3, first + row, first + rows, column, c);
        });
  }

  // The tile of y whose first row is output `row`; outputs from `end` on are other blocks'.
  EVIT_DEVICE static void store_output(void* y, const float* EVIT_RESTRICT b3, i64 row, i64 end,
                                       int column, const Accumulator& c) {
    column += Tile::column();
    float bias[4];
    load_numbers<4>(bias, b3 + column);
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const i64 output = row + Tile::row(half);
      if (output >= end) continue;
      float out[4];
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) out[j] = c.d[Tile::at(half, j)] + bias[j];
      store_4(static_cast<Y*>(y) + output * S.CO + column, out);
    }
  }

  // s_rows [rows][kChunk] = g * gate from hidden channel f on; zeros behind the last output.
  template <int kChunk, int kStride>
  EVIT_DEVICE static void load_gated(const PatchMergeProjectArgs<T>& p, i64 first, int f,
                                     T* s_rows) {
    constexpr int kVectors = kChunk / 8;
    const i64 image = first / p.outputs, count = p.B * p.outputs;
    const int before = static_cast<int>(first - image * p.outputs);
    const int outputs = static_cast<int>(p.outputs);
    for (int i = thread_id(); i < S.rows * kVectors; i += kThreads) {
      const int row = i / kVectors, c = i % kVectors * 8;
      T* to = s_rows + row * kStride + c;
      if (first + row < count) {
        multiply_by(to, p.g + (first + row) * S.F + f + c,
                    p.gate + (image + (before + row) / outputs) * S.F + f + c);
      } else {
        const float zeros[8] = {};
        store_8(to, zeros);
      }
    }
  }

  // out[image][n] = act(sum over k of weights[n][k] in[image][k], bias[n]) of `group` images.
  template <int K, int N, typename Act>
  EVIT_DEVICE static void dense(const PatchMergeDenseArgs<T>& p, Act act) {
    constexpr int kDenseThreads = kPatchMergeDenseWarps * 32;
    const i64 first = static_cast<i64>(block_x()) * S.group;
    float* s_in = reinterpret_cast<float*>(shared_memory());
    for (int i = thread_id(); i < S.group * (K / 4); i += kDenseThreads) {
      const i64 image = first + i / (K / 4);
      const int k = i % (K / 4) * 4;
      float sum[4] = {0, 0, 0, 0};
      for (i64 part = 0; image < p.B && part < p.parts; part++) {
        float value[4];
        load_numbers<4>(value, p.in + (image * p.parts + part) * K + k);
        EVIT_UNROLL
        for (int j = 0; j < 4; j++) sum[j] += value[j];
      }
      store_4(s_in + i * 4, sum);
    }
    sync_block();
    const int row = (block_y() * kPatchMergeDenseWarps + warp_id()) * S.lines;
    multiply_vectors<K, S.group, S.lines>(s_in, p.weights, row, N,
                                          row + S.lines < N ? row + S.lines : N,
                                          [&](int n, int i, float sum) {
                                            if (first + i < p.B)
                                              p.out[(first + i) * N + n] = act(sum, p.bias[n]);
                                          });
  }
};

}  // namespace evit::cuda
#endif
