// NEON of aarch64: 4 floats, 32 registers, fused multiply-add.
#pragma once

#include <arm_neon.h>

namespace evit::cpu::neon {
namespace {

typedef float f32 __attribute__((vector_size(16)));
typedef float f32_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int kLanes = 4;

// 5x16: 20 accumulators + 4 of B + 5 of A, which GCC loads first, = 29 of 32. Two panels would
// leave 2 rows.
constexpr int kRows2 = 1, kRows3 = 0, kRows4 = 0, kRows1 = 5;
constexpr int kMaxPanels = 3;  // 12 accumulators + 12 of B + 1 broadcast
constexpr int kDwColumns = 14;
constexpr int kConv1Channels = 8, kConv1Vectors = 3;

EVIT_INLINE f32 load(const float* p) { return *(const f32_unaligned*)p; }
EVIT_INLINE void store(float* p, f32 v) { *(f32_unaligned*)p = v; }
EVIT_INLINE f32 splat(float x) { return f32{x, x, x, x}; }
EVIT_INLINE f32 fma(f32 a, f32 b, f32 c) { return vfmaq_f32(c, a, b); }
EVIT_INLINE f32 vmax(f32 a, f32 b) { return vmaxq_f32(a, b); }  // NaN if either is
EVIT_INLINE f32 vmin(f32 a, f32 b) { return vminq_f32(a, b); }
EVIT_INLINE f32 round_even(f32 x) { return vrndnq_f32(x); }
EVIT_INLINE f32 scale2(f32 p, f32 n) {
  const int32x4_t e = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return p * (f32)vshlq_n_s32(e, 23);
}

EVIT_INLINE float hsum(f32 x) { return vaddvq_f32(x); }
EVIT_INLINE float hmax(f32 x) { return vmaxvq_f32(x); }

EVIT_INLINE void transpose4(const float* x, long ldx, float* y, long ldy) {
  const float32x4_t r0 = load(x), r1 = load(x + ldx), r2 = load(x + 2 * ldx);
  const float32x4_t r3 = load(x + 3 * ldx);
  const float64x2_t a = (float64x2_t)vtrn1q_f32(r0, r1), b = (float64x2_t)vtrn2q_f32(r0, r1);
  const float64x2_t c = (float64x2_t)vtrn1q_f32(r2, r3), d = (float64x2_t)vtrn2q_f32(r2, r3);
  store(y, (f32)vtrn1q_f64(a, c));
  store(y + ldy, (f32)vtrn1q_f64(b, d));
  store(y + 2 * ldy, (f32)vtrn2q_f64(a, c));
  store(y + 3 * ldy, (f32)vtrn2q_f64(b, d));
}

// y[c][r] = x[r][c] for a 16 x 16 block.
EVIT_INLINE void transpose16(const float* x, long ldx, float* y, long ldy) {
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) transpose4(x + i * ldx + j, ldx, y + j * ldy + i, ldy);
}

// Splits 2*kLanes numbers into even and odd positions.
EVIT_INLINE void deinterleave(const float* x, f32* even, f32* odd) {
  const float32x4x2_t v = vld2q_f32(x);
  *even = v.val[0];
  *odd = v.val[1];
}

EVIT_INLINE void deinterleave(uint8x8_t v, f32* even, f32* odd) {
  const uint16x8_t e = vmovl_u8(vuzp1_u8(v, v)), o = vmovl_u8(vuzp2_u8(v, v));
  *even = vcvtq_f32_u32(vmovl_u16(vget_low_u16(e)));
  *odd = vcvtq_f32_u32(vmovl_u16(vget_low_u16(o)));
}

EVIT_INLINE void deinterleave(const uint8_t* x, f32* even, f32* odd) {
  deinterleave(vld1_u8(x), even, odd);
}

// 2*kLanes RGB pixels: even and odd pixels of each channel.
EVIT_INLINE void deinterleave_rgb(const float* x, f32* even, f32* odd) {
  const float32x4x3_t a = vld3q_f32(x), b = vld3q_f32(x + 12);
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) {
    even[ch] = vuzp1q_f32(a.val[ch], b.val[ch]);
    odd[ch] = vuzp2q_f32(a.val[ch], b.val[ch]);
  }
}

EVIT_INLINE void deinterleave_rgb(const uint8_t* x, f32* even, f32* odd) {
  const uint8x8x3_t v = vld3_u8(x);
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) deinterleave(v.val[ch], even + ch, odd + ch);
}

}  // namespace
}  // namespace evit::cpu::neon
