// The vector vocabulary of one instruction set: f32, kLanes, load, store, splat, fma, vmax, vmin,
// hsum, hmax, exp2, transpose16, deinterleave and deinterleave_rgb (floats or bytes). An op file
// sees only these. EVIT_UNROLL goes on every loop that touches a register tile, the zeroing
// included; without it GCC keeps the tile on the stack.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/shapes.h"

#define EVIT_UNROLL _Pragma("GCC unroll 64")
#define EVIT_INLINE static inline __attribute__((always_inline))
#define EVIT_NOINLINE static __attribute__((noinline))

#define EVIT_STRING_(x) #x
#define EVIT_STRING(x) EVIT_STRING_(x)
#define EVIT_JOIN_(a, b) a##b
#define EVIT_JOIN(a, b) EVIT_JOIN_(a, b)
// clang-format off
#define EVIT_SIMD_HEADER EVIT_STRING(cpu/EVIT_JOIN(simd_, EVIT_ISA).h)
// clang-format on

#include EVIT_SIMD_HEADER

namespace evit::cpu::EVIT_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;  // vectors per packed panel

EVIT_INLINE f32 relu(f32 x) { return vmax(splat(0.0f), x); }  // this order: NaN stays NaN

// 2^x for x up to 126, relative error 2e-7. The clamp at 2^-100 keeps softmax tails and their
// products normal (denormal assists cost 40 % of the op on widely spread scores) and makes 2^-inf
// tiny; NaN passes through.
EVIT_INLINE f32 exp2_small(f32 x) {
  x = vmax(splat(-100.0f), x);
  const f32 n = round_even(x);
  const f32 r = fma(splat(-1.0f), n, x);  // x - n, on the less busy pipe of Zen 4
  f32 p = splat(0.0013267f);
  p = fma(p, r, splat(0.00967546f));
  p = fma(p, r, splat(0.05550743f));
  p = fma(p, r, splat(0.24022122f));
  p = fma(p, r, splat(0.69314695f));
  p = fma(p, r, splat(1.00000007f));
  return scale2(p, n);
}

// The same for any x; 2^126 from there on.
EVIT_INLINE f32 exp2(f32 x) { return exp2_small(vmin(splat(126.0f), x)); }

constexpr float kLog2e = 1.4426950408889634f;

EVIT_INLINE f32 sigmoid(f32 x) { return splat(1.0f) / (splat(1.0f) + exp2(x * splat(-kLog2e))); }

EVIT_INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 3); }

EVIT_INLINE void zero(float* p, long n) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, splat(0.0f));
  for (; i < n; i++) p[i] = 0.0f;
}

}  // namespace
}  // namespace evit::cpu::EVIT_ISA
