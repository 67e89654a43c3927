// Portable vectors of 4 floats (the compiler maps them to SSE2, NEON or plain code): always built,
// the one to debug with.
#pragma once

namespace evit::cpu::scalar {
namespace {

typedef float f32 __attribute__((vector_size(16)));
typedef float f32_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i32 __attribute__((vector_size(16)));
constexpr int kLanes = 4;

// 2x16: 8 accumulators + 4 of B + 1 broadcast = 13 of the 16 registers of SSE2.
constexpr int kRows2 = 1, kRows3 = 0, kRows4 = 0, kRows1 = 2;
constexpr int kMaxPanels = 2;
constexpr int kDwColumns = 8;
constexpr int kConv1Channels = 4, kConv1Vectors = 2;

EVIT_INLINE f32 load(const float* p) { return *(const f32_unaligned*)p; }
EVIT_INLINE void store(float* p, f32 v) { *(f32_unaligned*)p = v; }
EVIT_INLINE f32 splat(float x) { return f32{x, x, x, x}; }
EVIT_INLINE f32 fma(f32 a, f32 b, f32 c) { return a * b + c; }
EVIT_INLINE f32 vmax(f32 a, f32 b) { return a > b ? a : b; }  // b if NaN
EVIT_INLINE f32 vmin(f32 a, f32 b) { return a < b ? a : b; }
EVIT_INLINE f32 round_even(f32 x) {  // exact for |x| < 2^22
  const f32 magic = splat(12582912.0f);
  return (x + magic) - magic;
}
EVIT_INLINE f32 scale2(f32 p, f32 n) {
  const i32 e = (__builtin_convertvector(n, i32) + 127) << 23;
  return p * (f32)e;
}

EVIT_INLINE float hsum(f32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
EVIT_INLINE float hmax(f32 x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// y[c][r] = x[r][c] for a 16 x 16 block.
EVIT_INLINE void transpose16(const float* x, long ldx, float* y, long ldy) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) y[j * ldy + i] = x[i * ldx + j];
}

// Splits 2*kLanes numbers into even and odd positions.
template <class T>
EVIT_INLINE void deinterleave(const T* x, f32* even, f32* odd) {
  *even = f32{(float)x[0], (float)x[2], (float)x[4], (float)x[6]};
  *odd = f32{(float)x[1], (float)x[3], (float)x[5], (float)x[7]};
}

// 2*kLanes RGB pixels: even and odd pixels of each channel.
template <class T>
EVIT_INLINE void deinterleave_rgb(const T* x, f32* even, f32* odd) {
  for (int ch = 0; ch < 3; ch++, x++) {
    even[ch] = f32{(float)x[0], (float)x[6], (float)x[12], (float)x[18]};
    odd[ch] = f32{(float)x[3], (float)x[9], (float)x[15], (float)x[21]};
  }
}

}  // namespace
}  // namespace evit::cpu::scalar
