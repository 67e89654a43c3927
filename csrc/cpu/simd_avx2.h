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

// Splits 2*kLanes floats into even and odd positions.
EVIT_INLINE void deinterleave(const float* x, f32* even, f32* odd) {
  const __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
  const __m256 lo = _mm256_permute2f128_ps(a, b, 0x20), hi = _mm256_permute2f128_ps(a, b, 0x31);
  const __m256 e = _mm256_shuffle_ps(lo, hi, 0x88), o = _mm256_shuffle_ps(lo, hi, 0xdd);
  // lo = a0..3 b0..3, hi = a4..7 b4..7: each half already holds four neighbours in order.
  *even = (f32)e;
  *odd = (f32)o;
}

// kLanes bytes as floats.
EVIT_INLINE f32 load_u8(const uint8_t* p) {
  return (f32)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

}  // namespace
}  // namespace evit::cpu::avx2
