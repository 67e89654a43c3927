// What a warp, or a thread, does in one instruction of the PTX ISA: the instruction itself on a
// card, its definition by the ISA's fragment tables on the emulator. An instruction that the card's
// architecture lacks traps; kernels for that architecture never name it.
//
// Section numbers are those of the PTX ISA 8.7: 9.7.14.5 (mma), 9.7.14.5.15 (ldmatrix),
// 9.7.9.25.3 (cp.async).
#pragma once

#include "device.cuh"

#if defined(__CUDACC_RTC__)
#define EVIT_PTX(arch) (__CUDA_ARCH__ >= arch * 10)
#endif

namespace evit::cuda {

#if !defined(__CUDACC_RTC__)
// One value of a fragment: T is f16 or bf16, two of them to a register.
template <typename T>
EVIT_DEVICE float element(const u32* fragment, int i) {
  return i & 1 ? high<T>(fragment[i >> 1]) : low<T>(fragment[i >> 1]);
}
template <int N>
struct Registers {
  u32 r[N];
};
template <int NA, int NB>
struct Operands {
  Registers<NA> a;
  Registers<NB> b;
};
template <int NA, int NB>
EVIT_DEVICE Operands<NA, NB> operands(const u32* a, const u32* b) {
  Operands<NA, NB> both;
  for (int i = 0; i < NA; i++) both.a.r[i] = a[i];
  for (int i = 0; i < NB; i++) both.b.r[i] = b[i];
  return both;
}
#endif

// d += a b^T: four products of 8x4 by 4x8, one per quad pair (lanes q*4 .. q*4+3 and +16). float16.
// a [2], b [2]: a lane holds four k of one row of A and of one column of B. d [8].
EVIT_DEVICE void mma_m8n8k4(float* d, const u32* a, const u32* b) {
#if defined(__CUDACC_RTC__)
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
#else
  const auto lanes = emulator::exchange(0xffffffffu, operands<2, 2>(a, b));
  if (emulator::kCounts) return;
  const int lane = lane_id(), quad = (lane >> 2 & 3) * 4;
  for (int i = 0; i < 8; i++) {
    const int row = (lane & 1) + (i & 2) + (lane < 16 ? 0 : 4);
    const int column = (i & 4) + (lane & 2) + (i & 1);
    const auto from_a =
        emulator::brought<Operands<2, 2>>(lanes, quad + (row & 3) + (row >> 2) * 16);
    const auto from_b =
        emulator::brought<Operands<2, 2>>(lanes, quad + (column & 3) + (column >> 2) * 16);
    float sum = 0;
    for (int k = 0; k < 4; k++) sum += element<f16>(from_a.a.r, k) * element<f16>(from_b.b.r, k);
    d[i] += sum;
  }
#endif
}

#if !defined(__CUDACC_RTC__)
// d [4] += A [16 x K] B [K x 8] with K = 8 or 16: rows lane/4 and +8, columns lane%4*2 and +1.
template <typename T, int K>
EVIT_DEVICE void mma_m16n8(float* d, const u32* a, const u32* b) {
  using Lanes = Operands<K / 4, K / 8>;
  const auto lanes = emulator::exchange(0xffffffffu, operands<K / 4, K / 8>(a, b));
  if (emulator::kCounts) return;
  const int lane = lane_id();
  for (int i = 0; i < 4; i++) {
    const int row = (lane >> 2) + (i >> 1) * 8, column = (lane & 3) * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < K; k++) {
      const auto from_a = emulator::brought<Lanes>(lanes, (row & 7) * 4 + (k & 7) / 2);
      const auto from_b = emulator::brought<Lanes>(lanes, column * 4 + (k & 7) / 2);
      const int half = k >> 3;
      sum += element<T>(from_a.a.r, half * 4 + (row >> 3) * 2 + (k & 1)) *
             element<T>(from_b.b.r, half * 2 + (k & 1));
    }
    d[i] += sum;
  }
}
#endif

// d [4] += a [2] b [1]: 16x8 by 8x8. float16; from sm_75.
EVIT_DEVICE void mma_m16n8k8(float* d, const u32* a, const u32* b) {
#if !defined(__CUDACC_RTC__)
  mma_m16n8<f16, 8>(d, a, b);
#elif EVIT_PTX(75)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
  trap();
#endif
}

// d [4] += a [4] b [2]: 16x16 by 16x8. T is f16 or bf16; from sm_80.
template <typename T>
EVIT_DEVICE void mma_m16n8k16(float* d, const u32* a, const u32* b);

#if !defined(__CUDACC_RTC__)
template <typename T>
EVIT_DEVICE void mma_m16n8k16(float* d, const u32* a, const u32* b) {
  mma_m16n8<T, 16>(d, a, b);
}
#elif EVIT_PTX(80)
#define EVIT_MMA_M16N8K16(T, NAME)                                                    \
  template <>                                                                         \
  EVIT_DEVICE void mma_m16n8k16<T>(float* d, const u32* a, const u32* b) {            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
EVIT_MMA_M16N8K16(f16, "f16")
EVIT_MMA_M16N8K16(bf16, "bf16")
#undef EVIT_MMA_M16N8K16
#else
template <typename T>
EVIT_DEVICE void mma_m16n8k16(float*, const u32*, const u32*) {
  trap();
}
#endif

// Four 8x8 matrices of 16-bit numbers from shared memory; lane i gives the address of row i%8 of
// matrix i/8 and gets, of each, row lane/4, columns lane%4*2 and +1. From sm_75.
EVIT_DEVICE void ldmatrix_x4(u32* r, const void* row) {
#if !defined(__CUDACC_RTC__)
  const auto lanes = emulator::exchange(0xffffffffu, emulator::load<u32x4>(row));
  const int lane = lane_id();
  for (int i = 0; i < 4; i++) {
    const auto from = emulator::brought<Registers<4>>(lanes, i * 8 + (lane >> 2));
    r[i] = from.r[lane & 3];
  }
#elif EVIT_PTX(75)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  trap();
#endif
}

// 16 bytes from global to shared memory, or 16 zeros where not `inside`. Asynchronous from sm_80,
// at once below: then commit and wait do nothing.
EVIT_DEVICE void copy_async(void* shared, const void* global, bool inside) {
#if !defined(__CUDACC_RTC__)
  emulator::copy_async(shared, global, inside);
#elif EVIT_PTX(80)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
#else
  u32x4 value = {0, 0, 0, 0};
  if (inside) value = *static_cast<const u32x4*>(global);
  *static_cast<u32x4*>(shared) = value;
#endif
}
EVIT_DEVICE void commit_copies() {
#if !defined(__CUDACC_RTC__)
  emulator::commit_copies();
#elif EVIT_PTX(80)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups but the youngest N.
template <int N>
EVIT_DEVICE void wait_copies() {
#if !defined(__CUDACC_RTC__)
  emulator::wait_copies(N);
#elif EVIT_PTX(80)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace evit::cuda
