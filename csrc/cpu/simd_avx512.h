// AVX-512 (F, BW, DQ, VL): 16 floats, 32 registers.
#pragma once

#include <immintrin.h>

namespace evit::cpu::avx512 {
namespace {

typedef float f32 __attribute__((vector_size(64)));
typedef float f32_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kLanes = 16;

// Register tile of the GEMM: rows x 16-column panels. 14x2: 28 accumulators + 2 of B + 1 broadcast
// = 31 of 32.
constexpr int kRows2 = 14, kRows3 = 9, kRows4 = 6, kRows1 = 16;
constexpr int kMaxPanels = 6;   // panels side by side for a single row
constexpr int kDwColumns = 14;  // outputs of a depthwise row kept in registers
constexpr int kConv1Channels = 8, kConv1Vectors = 3;  // 24 accumulators + 3 pixels + 1 weight

EVIT_INLINE f32 load(const float* p) { return *(const f32_unaligned*)p; }
EVIT_INLINE void store(float* p, f32 v) { *(f32_unaligned*)p = v; }
EVIT_INLINE f32 splat(float x) { return (f32)_mm512_set1_ps(x); }
EVIT_INLINE f32 fma(f32 a, f32 b, f32 c) {
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
EVIT_INLINE f32 vmax(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }  // b if NaN
EVIT_INLINE f32 vmin(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }
EVIT_INLINE f32 round_even(f32 x) { return (f32)_mm512_roundscale_ps((__m512)x, 8); }
EVIT_INLINE f32 scale2(f32 p, f32 n) { return (f32)_mm512_scalef_ps((__m512)p, (__m512)n); }

EVIT_INLINE float hsum(f32 x) { return _mm512_reduce_add_ps((__m512)x); }
EVIT_INLINE float hmax(f32 x) { return _mm512_reduce_max_ps((__m512)x); }

// y[c][r] = x[r][c] for a 16 x 16 block.
EVIT_INLINE void transpose16(const float* x, long ldx, float* y, long ldy) {
  __m512 r[16], t[16];
  EVIT_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(x + i * ldx);
  EVIT_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  EVIT_UNROLL for (int i = 0; i < 4; i++) {
    const __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 1];
    const __m512d c = (__m512d)t[4 * i + 2], d = (__m512d)t[4 * i + 3];
    r[4 * i] = (__m512)_mm512_unpacklo_pd(a, c);
    r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, c);
    r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(b, d);
    r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(b, d);
  }
  EVIT_UNROLL for (int i = 0; i < 4; i++) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_ps(y + i * ldy, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(y + (i + 4) * ldy, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(y + (i + 8) * ldy, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(y + (i + 12) * ldy, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}

// Splits 2*kLanes floats into even and odd positions.
EVIT_INLINE void deinterleave(const float* x, f32* even, f32* odd) {
  const __m512i ie = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i io = _mm512_add_epi32(ie, _mm512_set1_epi32(1));
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  *even = (f32)_mm512_permutex2var_ps(a, ie, b);
  *odd = (f32)_mm512_permutex2var_ps(a, io, b);
}

EVIT_INLINE void deinterleave(const uint8_t* x, f32* even, f32* odd) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)x);
  const __m512i e = _mm512_cvtepu16_epi32(_mm256_and_si256(v, _mm256_set1_epi16(255)));
  const __m512i o = _mm512_cvtepu16_epi32(_mm256_srli_epi16(v, 8));
  *even = (f32)_mm512_cvtepi32_ps(e);
  *odd = (f32)_mm512_cvtepi32_ps(o);
}

// 2*kLanes RGB pixels: even and odd pixels of each channel.
EVIT_INLINE void deinterleave_rgb(const float* x, f32* even, f32* odd) {
  __m512 half[2][3];  // 16 pixels of a channel: 8 even, 8 odd ones
  EVIT_UNROLL for (int h = 0; h < 2; h++) {
    const __m512 a = _mm512_loadu_ps(x + 48 * h), b = _mm512_loadu_ps(x + 48 * h + 16);
    const __m512 c = _mm512_loadu_ps(x + 48 * h + 32);
    EVIT_UNROLL for (int ch = 0; ch < 3; ch++) {
      // Position i < 8 wants float 6i + ch, the others 6(i - 8) + 3 + ch: first from a and b, then
      // from c.
      const __m512i at = _mm512_add_epi32(
          _mm512_setr_epi32(0, 6, 12, 18, 24, 30, 36, 42, 3, 9, 15, 21, 27, 33, 39, 45),
          _mm512_set1_epi32(ch));
      const __mmask16 third = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32));
      half[h][ch] = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, at, b), third, at, c);
    }
  }
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) {
    even[ch] = (f32)_mm512_shuffle_f32x4(half[0][ch], half[1][ch], 0x44);
    odd[ch] = (f32)_mm512_shuffle_f32x4(half[0][ch], half[1][ch], 0xee);
  }
}

EVIT_INLINE void deinterleave_rgb(const uint8_t* x, f32* even, f32* odd) {
  const __m512i spread = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
  const __m512i ie = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
  const __m512i io = _mm512_add_epi32(ie, _mm512_set1_epi32(2));
  __m512i half[2];  // 16 pixels, 4 in each 128-bit lane
  EVIT_UNROLL for (int h = 0; h < 2; h++) {
    half[h] = _mm512_permutexvar_epi32(spread, _mm512_maskz_loadu_epi32(0xfff, x + 48 * h));
  }
  EVIT_UNROLL for (int ch = 0; ch < 3; ch++) {
    // In each lane: two even pixels, two odd ones, as 32-bit integers.
    const __m512i pick = _mm512_broadcast_i32x4(
        _mm_setr_epi32(0x80808000 + ch, 0x80808006 + ch, 0x80808003 + ch, 0x80808009 + ch));
    const __m512 a = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(half[0], pick));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(half[1], pick));
    even[ch] = (f32)_mm512_permutex2var_ps(a, ie, b);
    odd[ch] = (f32)_mm512_permutex2var_ps(a, io, b);
  }
}

}  // namespace
}  // namespace evit::cpu::avx512
