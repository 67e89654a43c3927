// The ceilings of one instruction set: multiply-adds in registers, reading and copying.
#include "cpu/ceilings.h"

#include "cpu/simd.h"

namespace evit::cpu::EVIT_ISA {
namespace {

// A multiply-add takes 4 cycles and two start in each: 8 chains at least. As many as the registers
// hold beside the two factors, so that a late one delays nobody.
constexpr int kChains = kLanes == 16 ? 24 : 12;

// The barrier ends the step: without it GCC would take the steps apart and keep fewer chains.
EVIT_NOINLINE float fma_loop(int64_t steps) {
  f32 a[kChains];
  const f32 x = splat(0.999f), y = splat(0.001f);
  EVIT_UNROLL for (int i = 0; i < kChains; i++) a[i] = splat((float)i);
  for (int64_t t = 0; t < steps; t++) {
    EVIT_UNROLL for (int i = 0; i < kChains; i++) a[i] = fma(a[i], x, y);
    asm volatile("" ::: "memory");
  }
  f32 sum = a[0];
  EVIT_UNROLL for (int i = 1; i < kChains; i++) sum += a[i];
  return hsum(sum);
}

// Maxima, not sums: they finish in a cycle or two, so eight of them never hold the loads back.
EVIT_NOINLINE float read_loop(const float* x, int64_t n) {
  f32 a[8];
  EVIT_UNROLL for (int i = 0; i < 8; i++) a[i] = splat(0.0f);
  for (int64_t t = 0; t < n; t += 8 * kLanes)
    EVIT_UNROLL for (int i = 0; i < 8; i++) a[i] = vmax(a[i], load(x + t + i * kLanes));
  EVIT_UNROLL for (int i = 1; i < 8; i++) a[0] = vmax(a[0], a[i]);
  return hmax(a[0]);
}

EVIT_NOINLINE void copy_loop(const float* x, float* y, int64_t n) {
  for (int64_t t = 0; t < n; t += 8 * kLanes) {
    EVIT_UNROLL for (int i = 0; i < 8; i++) store(y + t + i * kLanes, load(x + t + i * kLanes));
    asm volatile("" ::: "memory");  // or GCC turns the loop into a call of memcpy
  }
}

}  // namespace

extern const Ceilings kCeilings;
const Ceilings kCeilings = {EVIT_STRING(EVIT_ISA), fma_loop, kChains, kLanes, read_loop, copy_loop};

}  // namespace evit::cpu::EVIT_ISA
