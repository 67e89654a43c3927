// Patch embedding in CUDA: four 3x3 convolutions with stride 2. Meaning: evit_fast/ops/stem.py.
//
// `pixels`: conv1 and conv2. One block = rows x columns positions of map 2. In shared memory, both
// as the rows of a product (StemPlanes):
//
//   pixels  T [positions of map 1][16 for every 4 channels of the image], in tap rows
//   map     T [positions of map 2][3 * C/8 up to 16], in tap rows: map 1, never stored elsewhere
//
// A pixel in an even column is the last of one position and the first of the next: it lies there
// twice, and the k behind the third pixel are zeros, not neighbours, which might be NaN. So both
// convolutions read their operand as a matrix. With 3 channels conv1 has k = 48 of which 27 count:
// on tensor cores 1/4 of the instructions of 27 multiply-adds a channel, C/8 = 8, and 1/10 with 24.
// At C=192 an 8x8 block has 19 and 22 KiB; conv1 multiplies 19 row tiles, 13 % more than its share
// of map 1. Two barriers: the pixels are there; map 1 is there.
//
// `conv`: conv3 or conv4. One block = `tokens` tokens of the next map (images in a row) x 1/split
// of the channels. Shared memory holds a chunk of k for every token, twice: the next one is on its
// way (sm_80: asynchronous copies; else registers) while one is multiplied. One barrier a chunk.
//
// Every sum runs over k in order: results do not depend on tiles, chunks or B.
#pragma once

#include "stem_sizes.cuh"

#if defined(EVIT_DEVICE_CODE)
#include "ahead.cuh"
#include "instructions.cuh"

namespace evit::cuda {

template <typename Tile, StemSizes S>
struct StemPixels {
  using T = typename Tile::Number;
  using X = typename NumberOf<S.x_kind>::Type;
  using Fragment = typename Tile::Fragment;
  using Accumulator = typename Tile::Accumulator;
  using Args = StemPixelsArgs<T>;

  static constexpr int kFamily = Tile::kFamily, kThreads = S.warps * 32;
  static constexpr int C1 = S.C / 8, C2 = S.C / 4;
  static constexpr int kRows1 = 2 * S.rows + 1, kColumns1 = 2 * S.columns + 1;  // of map 1
  static constexpr StemPlanes kPixelPlanes = stem_planes(kRows1, kColumns1);
  static constexpr StemPlanes kMapPlanes = stem_planes(S.rows, S.columns);
  static constexpr StemPixelsMemory kMemory = stem_pixels_memory(S, kFamily);
  static constexpr int kChannelGroups = (S.in + 3) / 4;
  static constexpr int K1 = stem_k1(S), K2 = stem_k2(S);
  static constexpr int kStride1 = stem_stride(kFamily, K1), kStride2 = stem_stride(kFamily, K2);
  static constexpr int kTiles1 = (kRows1 * kColumns1 + 15) / 16, kTilesC1 = (C1 + 15) / 16;
  static constexpr int kSteps1 = 3 * kChannelGroups;
  static constexpr bool kHold = kSteps1 == 3;  // conv1's weights of 16 channels, in registers

  // conv2: kWarpRows x kWarpColumns warps.
  static constexpr int MT = (S.rows * S.columns + 15) / 16, NT = C2 / 16;
  static constexpr int kWarpRows = MT < S.warps ? MT : S.warps;
  static constexpr int kWarpColumns = S.warps / kWarpRows;
  static constexpr int kShare = (NT + kWarpColumns - 1) / kWarpColumns;
  static constexpr int kGroup = kShare < 3 ? kShare : 3;  // column tiles at once
  static_assert(S.warps % kWarpRows == 0, "every warp has a row tile");

  // Where a block lies: its image, and its first position of map 2.
  struct Place {
    i64 image;
    int row, column;
    int H, W, H1, W1, H2, W2;
  };

  EVIT_DEVICE static void run(const Args& p) {
    const Place at = place(p);
    load_pixels(p, at);
    clear_map_end();
    sync_block();
    conv1(p, at);
    sync_block();
    conv2(p, at);
  }

 private:
  EVIT_DEVICE static T* pixels() { return reinterpret_cast<T*>(shared_memory() + kMemory.pixels); }
  EVIT_DEVICE static T* map() { return reinterpret_cast<T*>(shared_memory() + kMemory.map); }
  // First position of a tap row.
  EVIT_DEVICE static int tap_row(const StemPlanes& planes, int ky, int columns) {
    return ky == 1 ? planes.even : ky / 2 * columns;
  }

  EVIT_DEVICE static Place place(const Args& p) {
    Place at;
    at.H = static_cast<int>(p.H), at.W = static_cast<int>(p.W);
    at.H1 = (at.H + 1) / 2, at.W1 = (at.W + 1) / 2;
    at.H2 = (at.H1 + 1) / 2, at.W2 = (at.W1 + 1) / 2;
    const u32 across = static_cast<u32>(at.W2 + S.columns - 1) / S.columns;
    const u32 down = static_cast<u32>(at.H2 + S.rows - 1) / S.rows;
    const u32 tile = static_cast<u32>(block_x());
    at.image = tile / (across * down);
    at.row = static_cast<int>(tile / across % down) * S.rows;
    at.column = static_cast<int>(tile % across) * S.columns;
    return at;
  }

  // A thread takes two neighbouring pixels of four channels.
  EVIT_DEVICE static void load_pixels(const Args& p, const Place& at) {
    constexpr int kLines = 2 * kRows1 + 1, kPairs = kColumns1 + 1;
    const X* x = static_cast<const X*>(p.x) + at.image * p.stride_b;
    const int first_row = 4 * at.row - 3, first_column = 4 * at.column - 3;
    for (int i = thread_id(); i < kChannelGroups * kLines * kPairs; i += kThreads) {
      const int pair = i % kPairs, line = i / kPairs % kLines, group = i / kPairs / kLines;
      const int row = first_row + line;
      float value[2][4];
      EVIT_UNROLL
      for (int dx = 0; dx < 2; dx++) {
        const int column = first_column + 2 * pair + dx;
        const bool inside = row >= 0 && row < at.H && column >= 0 && column < at.W;
        const X* pixel = x + row * p.stride_h + column * p.stride_w;
        EVIT_UNROLL
        for (int c = 0; c < 4; c++) {
          const int channel = group * 4 + c;
          float v = 0.0f;
          if (channel < S.in) {
            if constexpr (S.x_kind == kUint8) v = p.pad[channel];
            if (inside) v = number(pixel[channel * p.stride_c]);
          }
          value[dx][c] = v;
        }
      }
      T* s_line = pixels() + ((line & 1) * kPixelPlanes.even + line / 2 * kColumns1) * kStride1;
      if (pair < kColumns1) store_8(s_line + pair * kStride1 + group * 16, value[0]);
      EVIT_UNROLL
      for (int c = 0; c < 4; c++) value[1][c] = 0.0f;
      if (pair > 0) store_8(s_line + (pair - 1) * kStride1 + group * 16 + 8, value[0]);
    }
  }
  EVIT_DEVICE static float number(u8 x) { return static_cast<float>(x); }
  template <typename Float>
  EVIT_DEVICE static float number(Float x) {
    return to_float(x);
  }

  // The k of map 1 that no tap has.
  EVIT_DEVICE static void clear_map_end() {
    if constexpr (K2 > 3 * C1) {
      static_assert(K2 - 3 * C1 == 8);
      const float zeros[8] = {};
      for (int i = thread_id(); i < kMapPlanes.even + kMapPlanes.odd; i += kThreads) {
        store_8(map() + i * kStride2 + 3 * C1, zeros);
      }
    }
  }

  EVIT_DEVICE static void conv1(const Args& p, const Place& at) {
    for (int n = 0; n < kTilesC1; n++) {
      const T* weights = p.conv1 + n * kSteps1 * Tile::kPacked;
      Fragment b[kHold ? kSteps1 : 1];
      if constexpr (kHold) {
        EVIT_UNROLL
        for (int k = 0; k < kSteps1; k++) Tile::load_packed_b(b[k], weights + k * Tile::kPacked);
      }
      for (int m = warp_id(); m < kTiles1; m += S.warps) {
        Accumulator c = {};
        EVIT_UNROLL
        for (int ky = 0; ky < 3; ky++) {
          const T* rows = pixels() + (m * 16 + tap_row(kPixelPlanes, ky, kColumns1)) * kStride1;
          for (int group = 0; group < kChannelGroups; group++) {
            const int k = ky * kChannelGroups + group;
            Fragment a;
            Tile::load_a(a, rows + group * 16, kStride1);
            if constexpr (!kHold) Tile::load_packed_b(b[0], weights + k * Tile::kPacked);
            Tile::mma(c, a, b[kHold ? ky : 0]);
          }
        }
        store_map(p, at, m * 16, n * 16 + Tile::column(), c);
      }
    }
  }

  // relu(conv1) to where conv2's taps read it; zeros outside map 1.
  EVIT_DEVICE static void store_map(const Args& p, const Place& at, int first, int channel,
                                    const Accumulator& c) {
    if (channel >= C1) return;
    float bias[4];
    load_numbers<4>(bias, p.bias1 + channel);
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const int position = first + Tile::row(half);
      if (position >= kRows1 * kColumns1) continue;
      const int row = position / kColumns1, column = position % kColumns1;
      const int map_row = 2 * at.row - 1 + row, map_column = 2 * at.column - 1 + column;
      const bool inside = map_row >= 0 && map_row < at.H1 && map_column >= 0 && map_column < at.W1;
      float value[4];
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) {
        value[j] = inside ? relu(c.d[Tile::at(half, j)] + bias[j]) : 0.0f;
      }
      const int line = (row & 1) * kMapPlanes.even + row / 2 * S.columns;
      T* s_map = map() + (line + column / 2) * kStride2 + channel;
      if (column & 1) {
        store_4(s_map + C1, value);
      } else {
        if (column / 2 < S.columns) store_4(s_map, value);
        if (column > 0) store_4(s_map - kStride2 + 2 * C1, value);
      }
    }
  }

  EVIT_DEVICE static void conv2(const Args& p, const Place& at) {
    constexpr int KT = K2 / 16, D = steps_ahead<Tile>(KT, kGroup);
    const int column_tile = warp_id() / kWarpRows;
    for (int m = warp_id() % kWarpRows; m < MT; m += kWarpRows) {
      for (int n = column_tile; n < NT; n += kWarpColumns * kGroup) {
        AheadProduct<Tile, 1, kGroup, kWarpColumns, 3 * KT, D> product;
        product.start(p.conv2, n, NT);
        EVIT_UNROLL
        for (int ky = 0; ky < 3; ky++) {
          const int first = m * 16 + tap_row(kMapPlanes, ky, S.columns);
          product.template add<KT>(map() + first * kStride2, kStride2, ky * KT);
        }
        product.each([&](int, int column, const Accumulator& c) {
          store(p, at, m * 16, column + Tile::column(), c);
        });
      }
    }
  }

  EVIT_DEVICE static void store(const Args& p, const Place& at, int first, int channel,
                                const Accumulator& c) {
    float bias[4];
    load_numbers<4>(bias, p.bias2 + channel);
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const int position = first + Tile::row(half);
      const int row = at.row + position / S.columns, column = at.column + position % S.columns;
      if (position >= S.rows * S.columns || row >= at.H2 || column >= at.W2) continue;
      float value[4];
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) value[j] = relu(c.d[Tile::at(half, j)] + bias[j]);
      store_4(p.y + ((at.image * at.H2 + row) * at.W2 + column) * C2 + channel, value);
    }
  }
};

// Where the taps of a token lie in the map.
struct alignas(16) StemToken {
  i64 centre;  // number of the map at which its centre pixel starts
  i64 taps;    // bit t: tap t is inside the map
};

template <typename Tile, StemSizes S>
struct StemConv {
  using T = typename Tile::Number;
  using Y = typename NumberOf<S.y_kind>::Type;
  using Args = StemConvArgs<T>;

  static constexpr int kFamily = Tile::kFamily, kThreads = S.warps * 32;
  static constexpr StemConvMemory kMemory = stem_conv_memory(S, kFamily);
  static constexpr int kStride = stem_stride(kFamily, S.chunk);
  static constexpr int K = 9 * S.CIN, kChunks = K / S.chunk, KT = S.chunk / 16;
  static_assert(K % S.chunk == 0 && S.chunk % 16 == 0);
  static constexpr int NT = S.COUT / 16, kShare = (NT + S.split - 1) / S.split;  // of a block
  static constexpr int MT = S.tokens / 16, kWarpRows = MT > 1 ? 2 : 1, M = MT / kWarpRows;
  static constexpr int kWarpColumns = S.warps / kWarpRows;
  static constexpr int N = (kShare + kWarpColumns - 1) / kWarpColumns;
  static_assert(M * N * 8 <= 96, "the sums leave no registers; split the channels");

  // Pieces of 16 bytes of a chunk; those of a thread.
  static constexpr int kWidth = 16 / sizeof(T), kRowPieces = S.chunk / kWidth;
  static constexpr int kPieces = S.tokens * kRowPieces;
  static constexpr int kMine = (kPieces + kThreads - 1) / kThreads;
  static constexpr bool kAsynchronous = kFamily >= 80;
  struct Pieces {
    u32x4 piece[kAsynchronous ? 1 : kMine];
  };

  EVIT_DEVICE static void run(const Args& p) {
    const i64 first = static_cast<i64>(block_x()) * S.tokens;
    const i64 end = p.B * ((p.H + 1) / 2) * ((p.W + 1) / 2);
    const int warp_row = warp_id() % kWarpRows;
    const int begin = block_y() * kShare, tiles_end = begin + kShare < NT ? begin + kShare : NT;
    AheadProduct<Tile, M, N, kWarpColumns, K / 16, steps_ahead<Tile>(KT, N)> product;
    product.start(p.w, begin + warp_id() / kWarpRows, tiles_end);
    find_tokens(p, first, end);
    sync_block();

    Pieces pieces;
    ask(p, 0, pieces);
    for (int chunk = 0; chunk < kChunks; chunk++) {
      arrive(chunk, pieces);
      sync_block();  // everyone has passed the chunk before: its buffer is free
      if (chunk + 1 < kChunks) ask(p, chunk + 1, pieces);
      product.template add<KT>(rows(chunk) + warp_row * M * 16 * kStride, kStride, chunk * KT);
    }
    product.each([&](int row, int column, const typename Tile::Accumulator& c) {
      store(p, first + warp_row * M * 16 + row, end, column + Tile::column(), c);
    });
  }

 private:
  EVIT_DEVICE static T* rows(int chunk) {
    return reinterpret_cast<T*>(shared_memory() + kMemory.rows + (chunk & 1) * kMemory.rows_bytes);
  }
  EVIT_DEVICE static StemToken* tokens() {
    return reinterpret_cast<StemToken*>(shared_memory() + kMemory.tokens);
  }

  EVIT_DEVICE static void find_tokens(const Args& p, i64 first, i64 end) {
    for (int t = thread_id(); t < S.tokens; t += kThreads) {
      StemToken token = {0, 0};
      if (first + t < end) {
        const i64 across = (p.W + 1) / 2, down = (p.H + 1) / 2;
        const i64 column = (first + t) % across * 2, line = (first + t) / across;
        const i64 row = line % down * 2;
        token.centre = ((line / down * p.H + row) * p.W + column) * S.CIN;
        EVIT_UNROLL
        for (int tap = 0; tap < 9; tap++) {
          const i64 y = row + tap / 3 - 1, x = column + tap % 3 - 1;
          if (y >= 0 && y < p.H && x >= 0 && x < p.W) token.taps |= 1 << tap;
        }
      }
      tokens()[t] = token;
    }
  }

  // Sends for a chunk: into its buffer, or into registers.
  EVIT_DEVICE static void ask(const Args& p, int chunk, Pieces& pieces) {
    EVIT_UNROLL
    for (int i = 0; i < kMine; i++) {
      const int at = thread_id() + i * kThreads;
      if (kPieces % kThreads != 0 && at >= kPieces) continue;
      const int row = at / kRowPieces, column = at % kRowPieces * kWidth;
      const int k = chunk * S.chunk + column, tap = k / S.CIN, c = k % S.CIN;
      const StemToken token = tokens()[row];
      const bool inside = token.taps >> tap & 1;
      const i64 from = token.centre + ((tap / 3 - 1) * p.W + tap % 3 - 1) * S.CIN + c;
      const T* piece = p.x + (inside ? from : 0);
      if constexpr (kAsynchronous) {
        copy_async(rows(chunk) + row * kStride + column, piece, inside);
      } else {
        pieces.piece[i] = {0, 0, 0, 0};
        if (inside) pieces.piece[i] = load_u32x4(piece);
      }
    }
    if constexpr (kAsynchronous) commit_copies();
  }

  // Its numbers are in its buffer, as far as this thread has asked for them.
  EVIT_DEVICE static void arrive(int chunk, const Pieces& pieces) {
    if constexpr (kAsynchronous) {
      wait_copies<0>();
    } else {
      EVIT_UNROLL
      for (int i = 0; i < kMine; i++) {
        const int at = thread_id() + i * kThreads;
        if (kPieces % kThreads != 0 && at >= kPieces) continue;
        const int row = at / kRowPieces, column = at % kRowPieces * kWidth;
        store_vector(rows(chunk) + row * kStride + column, pieces.piece[i]);
      }
    }
  }

  EVIT_DEVICE static void store(const Args& p, i64 first, i64 end, int channel,
                                const typename Tile::Accumulator& c) {
    float bias[4];
    load_numbers<4>(bias, p.bias + channel);
    EVIT_UNROLL
    for (int half = 0; half < 2; half++) {
      const i64 token = first + Tile::row(half);
      if (token >= end) continue;
      float value[4];
      EVIT_UNROLL
      for (int j = 0; j < 4; j++) {
        value[j] = c.d[Tile::at(half, j)] + bias[j];
        if (S.relu) value[j] = relu(value[j]);
      }
      store_4(static_cast<Y*>(p.y) + token * S.COUT + channel, value);
    }
  }
};

template <typename Tile, StemSizes S>
struct StemKernel {
  using T = typename Tile::Number;
  EVIT_DEVICE static void pixels(const StemPixelsArgs<T>& p) { StemPixels<Tile, S>::run(p); }
  EVIT_DEVICE static void conv(const StemConvArgs<T>& p) { StemConv<Tile, S>::run(p); }
};

}  // namespace evit::cuda
#endif
