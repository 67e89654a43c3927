// AVX2 + FMA: 8 floats, 16 registers.
#pragma once

#include <immintrin.h>

namespace evit::cpu::avx2 {
namespace {

typedef float f32 __attribute__((vector_size(32)));
typedef float f32_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kLanes = 8;

// 6x16: 12 accumulators + 2 of B + 1 broadcast = 15 of 16. Two panels: 3x32.
constexpr int kRows2 = 3, kRows3 = 0, kRows4 = 1, kRows1 = 6;
constexpr int kMaxPanels = 5;
constexpr int kDwColumns = 10;
constexpr int kConv1Channels = 4, kConv1Vectors = 3;

EVIT_INLINE f32 load(const float* p) { return *(const f32_unaligned*)p; }
EVIT_INLINE void store(float* p, f32 v) { *(f32_unaligned*)p = v; }
EVIT_INLINE f32 splat(float x) { return (f32)_mm256_set1_ps(x); }
EVIT_INLINE f32 fma(f32 a, f32 b, f32 c) {
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
EVIT_INLINE f32 vmax(f32 a, f32 b) { return (f32)_mm256_max_ps((__m256)a, (__m256)b); }  // b if NaN
EVIT_INLINE f32 vmin(f32 a, f32 b) { return (f32)_mm256_min_ps((__m256)a, (__m256)b); }
EVIT_INLINE f32 round_even(f32 x) { return (f32)_mm256_round_ps((__m256)x, 8); }
EVIT_INLINE f32 scale2(f32 p, f32 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)n), _mm256_set1_epi32(127));
  return p * (f32)_mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}

EVIT_INLINE float hsum(f32 x) {
  const __m128 a =
      _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
EVIT_INLINE float hmax(f32 x) {
  const __m128 a =
      _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}

EVIT_INLINE void transpose8(const float* x, long ldx, float* y, long ldy) {
  __m256 r[8], t[8];
  EVIT_UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(x + i * ldx);
  EVIT_UNROLL for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  EVIT_UNROLL for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  EVIT_UNROLL for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(y + i * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(y + (i + 4) * ldy, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// y[c][r] = x[r][c] for a 16 x 16 block.
EVIT_INLINE void transpose16(const float* x, long ldx, float* y, long ldy) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) transpose8(x + i * ldx + j, ldx, y + j * ldy + i, ldy);
}

EVIT_INLINE void deinterleave(__m256 a, __m256 b, f32* even, f32* odd) {
  const __m256 lo = _mm256_permute2f128_ps(a, b, 0x20), hi = _mm256_permute2f128_ps(a, b, 0x31);
  const __m256 e = _mm256_shuffle_ps(lo, hi, 0x88), o = _mm256_shuffle_ps(lo, hi, 0xdd);
  // lo = a0..3 b0..3, hi = a4..7 b4..7: each half already holds four neighbours in order.
  *even = (f32)e;
  *odd = (f32)o;
}

// Splits 2*kLanes floats into even and odd positions.
EVIT_INLINE void deinterleave(const float* x, f32* even, f32* odd) {
  deinterleave(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), even, odd);
}

EVIT_INLINE void deinterleave(const uint8_t* x, f32* even, f32* odd) {
  const __m128i v = _mm_loadu_si128((const __m128i*)x);
  const __m256i e = _mm256_cvtepu16_epi32(_mm_and_si128(v, _mm_set1_epi16(255)));
  const __m256i o = _mm256_cvtepu16_epi32(_mm_srli_epi16(v, 8));
  *even = (f32)_mm256_cvtepi32_ps(e);
  *odd = (f32)_mm256_cvtepi32_ps(o);
}

// Two 16-byte halves, `gap` bytes apart.
EVIT_INLINE __m256i load_halves(const void* p, int gap) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                 _mm_loadu_si128((const __m128i*)((const char*)p + gap)), 1);
}

// 8 RGB pixels, planar. Pixels 0-3 go through the lower half of each register, 4-7 through the
// upper one.
EVIT_INLINE void planar_rgb(const float* x, __m256* rgb) {
  const __m256 a = (__m256)load_halves(x, 48), b = (__m256)load_halves(x + 4, 48);
  const __m256 c = (__m256)load_halves(x + 8, 48);  // r0 g0 b0 r1 | g1 b1 r2 g2 | b2 r3 g3 b3
  const __m256 rg = _mm256_shuffle_ps(b, c, 0x9e);  // r2 g2 r3 g3
  const __m256 gb = _mm256_shuffle_ps(a, b, 0x49);  // g0 b0 g1 b1
  rgb[0] = _mm256_shuffle_ps(a, rg, 0x8c);          // r0 r1 r2 r3
  rgb[1] = _mm256_shuffle_ps(gb, rg, 0xd8);         // g0 g1 g2 g3
  rgb[2] = _mm256_shuffle_ps(gb, c, 0xcd);          // b0 b1 b2 b3
}

// 2*kLanes RGB pixels: even and odd pixels of each channel.
EVIT_INLINE void deinterleave_rgb(const float* x, f32* even, f32* odd) {
  __m256 a[3], b[3];
  planar_rgb(x, a);
  planar_rgb(x + 24, b);
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) deinterleave(a[ch], b[ch], even + ch, odd + ch);
}

EVIT_INLINE void deinterleave_rgb(const uint8_t* x, f32* even, f32* odd) {
  // Pixels 0-3 and 8-11; pixels 4-7 and 12-15, the last four 4 bytes into their half so that no
  // load leaves x[0..48).
  const __m256i a = load_halves(x, 24), b = load_halves(x + 12, 20);
  const __m256i step = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) {
    // In each half: two even pixels, two odd ones, as 32-bit integers.
    const __m256i pick = _mm256_broadcastsi128_si256(
        _mm_setr_epi32(0x80808000 + ch, 0x80808006 + ch, 0x80808003 + ch, 0x80808009 + ch));
    const __m256 u = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(a, pick));
    const __m256 v = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(b, _mm256_add_epi32(pick, step)));
    even[ch] = (f32)_mm256_shuffle_ps(u, v, 0x44);
    odd[ch] = (f32)_mm256_shuffle_ps(u, v, 0xee);
  }
}

}  // namespace
}  // namespace evit::cpu::avx2
