// Sizes, memory maps, arguments and launches of stem.cuh.
#pragma once

#include "launch.cuh"

namespace evit::cuda {

struct StemSizes {
  int in, C;  // channels of the image and of the tokens
  // pixels: positions of map 2 of a block
  int rows, columns;
  // conv: from map 2 or 3 to the next
  int CIN, COUT, relu;
  int tokens, chunk, split;  // of a block; chunk: of k = 9 * CIN, which it divides
  int warps;
  int x_kind, y_kind;  // kFloat32, ..; pixels: x also kUint8
};

// Eight rows at this distance lie in different banks, as with row_stride(), which takes more.
EVIT_HOST_DEVICE int stem_stride(int family, int n) {
  return family == 0 ? n + 4 : row_stride(family, n);
}
EVIT_HOST_DEVICE int round_up_16(int n) { return (n + 15) / 16 * 16; }

// A map in shared memory as the rows of a 3x3 convolution with stride 2. Row i of the product is
// position i of a tile of `rows` x `columns`; its k of one tap row lie next to each other. The
// map's even rows come first, then its odd ones: tap row 0 starts at row 0, tap row 1 at row
// `even`, tap row 2 at row `columns`.
struct StemPlanes {
  int even, odd;  // positions
  int extra;      // behind them, that the last tile of 16 reads and nobody uses
};
EVIT_HOST_DEVICE StemPlanes stem_planes(int rows, int columns) {
  return {(rows + 1) * columns, rows * columns, round_up_16(rows * columns) - rows * columns};
}
EVIT_HOST_DEVICE int stem_positions(int rows, int columns) {
  const StemPlanes p = stem_planes(rows, columns);
  return p.even + p.odd + p.extra;
}

// k of a tap row of conv1: for every four channels of the image 3 pixels of 4, and 4 zeros.
EVIT_HOST_DEVICE int stem_k1(const StemSizes& s) { return (s.in + 3) / 4 * 16; }
// k of a tap row of conv2: 3 positions of C/8 channels, and zeros.
EVIT_HOST_DEVICE int stem_k2(const StemSizes& s) { return round_up_16(3 * (s.C / 8)); }

struct StemPixelsMemory {  // bytes from the start of shared memory
  int pixels, map, end;
};
EVIT_HOST_DEVICE StemPixelsMemory stem_pixels_memory(const StemSizes& s, int family) {
  const int bytes = number_bytes(family);
  const int pixels = stem_positions(2 * s.rows + 1, 2 * s.columns + 1);
  const int map = pixels * stem_stride(family, stem_k1(s)) * bytes;
  const int positions = stem_positions(s.rows, s.columns);
  return {0, map, map + positions * stem_stride(family, stem_k2(s)) * bytes};
}

struct StemConvMemory {
  int tokens, rows, rows_bytes, end;  // two buffers of rows
};
EVIT_HOST_DEVICE StemConvMemory stem_conv_memory(const StemSizes& s, int family) {
  const int rows = s.tokens * 16;  // bytes of a token: see StemToken
  const int rows_bytes = s.tokens * stem_stride(family, s.chunk) * number_bytes(family);
  return {0, rows, rows_bytes, rows + 2 * rows_bytes};
}

template <typename T>
struct StemPixelsArgs {
  T* y;                // [B, H2, W2, C/4]: map 2
  const void* x;       // [B, IN, H, W] of x_kind, at the strides below
  const T* conv1;      // packed [C/8 up to 16][3 * stem_k1]; for pixels where x_kind is kUint8
  const float* bias1;  // [C/8 up to 16]
  const float* pad;    // [IN up to 4]: the pixel outside the image, for kUint8
  const T* conv2;      // packed [C/4][3 * stem_k2]
  const float* bias2;  // [C/4]
  i64 B, H, W;
  i64 stride_b, stride_c, stride_h, stride_w;  // of x, in numbers
};

template <typename T>
struct StemConvArgs {
  void* y;            // [B, (H+1)/2, (W+1)/2, COUT] of y_kind
  const T* x;         // [B, H, W, CIN]
  const T* w;         // packed [COUT][9 * CIN], k = (tap, channel)
  const float* bias;  // [COUT]
  i64 B, H, W;
};

// H, W: of the image.
EVIT_HOST_DEVICE LaunchShape stem_pixels_launch(const StemSizes& s, int family, i64 B, i64 H,
                                                i64 W) {
  const i64 tiles = ceil_div(ceil_div(H, 4), s.rows) * ceil_div(ceil_div(W, 4), s.columns);
  return {B * tiles, 1, s.warps * 32, stem_pixels_memory(s, family).end};
}
// H, W: of the map that the convolution reads.
EVIT_HOST_DEVICE LaunchShape stem_conv_launch(const StemSizes& s, int family, i64 B, i64 H, i64 W) {
  return {ceil_div(B * ceil_div(H, 2) * ceil_div(W, 2), s.tokens), s.split, s.warps * 32,
          stem_conv_memory(s, family).end};
}

}  // namespace evit::cuda
