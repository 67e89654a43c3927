// The language of the device code. NVRTC makes it CUDA's own, without a header of CUDA's; g++ makes
// it the emulator's (tests/emulator). Here are names of threads, barriers, numbers and vectors;
// instructions.cuh has what a warp does in one instruction, tile_*.cuh what is built on it.
#pragma once

#include "types.cuh"

#if !defined(__CUDACC_RTC__)
#include "emulator.h"
#endif

namespace evit::cuda {

// ---- who runs

#if defined(__CUDACC_RTC__)
EVIT_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
EVIT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
EVIT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
EVIT_DEVICE void sync_block() { __syncthreads(); }
EVIT_DEVICE void sync_warp() { __syncwarp(); }
template <typename T>
EVIT_DEVICE T shuffle_xor(T value, int bits) {
  return __shfl_xor_sync(0xffffffffu, value, bits);
}
template <typename T>
EVIT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// All shared memory is dynamic: its size is the launch's.
extern "C" __shared__ __align__(128) unsigned char evit_shared_memory[];
EVIT_DEVICE u8* shared_memory() { return evit_shared_memory; }
[[noreturn]] EVIT_DEVICE void trap() {
  asm volatile("trap;");
  __builtin_unreachable();
}
#else
EVIT_DEVICE int thread_id() { return static_cast<int>(emulator::thread->index.x); }
EVIT_DEVICE int block_x() { return static_cast<int>(emulator::block->index.x); }
EVIT_DEVICE int block_y() { return static_cast<int>(emulator::block->index.y); }
EVIT_DEVICE void sync_block(EMULATOR_WHERE) { emulator::sync_block(where); }
EVIT_DEVICE void sync_warp(EMULATOR_WHERE) { emulator::sync_warp(0xffffffffu, where); }
template <typename T>
EVIT_DEVICE T shuffle_xor(T value, int bits, EMULATOR_WHERE) {
  return emulator::shuffle_xor(0xffffffffu, value, bits, where);
}
template <typename T>
EVIT_DEVICE T shuffle(T value, int lane, EMULATOR_WHERE) {
  return emulator::shuffle(0xffffffffu, value, lane, where);
}
EVIT_DEVICE u8* shared_memory() { return emulator::block->shared; }
[[noreturn]] EVIT_DEVICE void trap() { __builtin_trap(); }
#endif

EVIT_DEVICE int lane_id() { return thread_id() & 31; }
EVIT_DEVICE int warp_id() { return thread_id() >> 5; }

// ---- numbers. Rounding is to nearest, ties to even; NaN stays NaN.

#if defined(__CUDACC_RTC__)
EVIT_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
EVIT_DEVICE float float_of(u32 x) { return __uint_as_float(x); }
EVIT_DEVICE float to_float(f16 x) {
  float y;
  asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "h"(x.bits));
  return y;
}
EVIT_DEVICE f16 to_f16(float x) {
  f16 y;
  asm("{.reg .f16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h;}" : "=h"(y.bits) : "f"(x));
  return y;
}
EVIT_DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
EVIT_DEVICE u32 bits_of(float x) {
  u32 y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
EVIT_DEVICE float float_of(u32 x) {
  float y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
EVIT_DEVICE float to_float(f16 x) {
  _Float16 y;
  __builtin_memcpy(&y, &x, sizeof y);
  return static_cast<float>(y);
}
EVIT_DEVICE f16 to_f16(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  f16 bits;
  __builtin_memcpy(&bits, &y, sizeof y);
  return bits;
}
EVIT_DEVICE float power_of_2(float x) { return __builtin_exp2f(x); }
#endif

EVIT_DEVICE float to_float(float x) { return x; }
EVIT_DEVICE float to_float(bf16 x) { return float_of(static_cast<u32>(x.bits) << 16); }
EVIT_DEVICE bf16 to_bf16(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return {static_cast<u16>(bits >> 16 | 0x40)};  // rounding could make it an infinity
  return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// A float as T, which is float, f16 or bf16.
template <typename T>
struct Number;
template <>
struct Number<float> {
  EVIT_DEVICE static float from(float x) { return x; }
};
template <>
struct Number<f16> {
  EVIT_DEVICE static f16 from(float x) { return to_f16(x); }
};
template <>
struct Number<bf16> {
  EVIT_DEVICE static bf16 from(float x) { return to_bf16(x); }
};

// Two numbers of 16 bits in one register, the first in the low half.
template <typename T>
EVIT_DEVICE u32 pack2(float a, float b) {
  return Number<T>::from(a).bits | static_cast<u32>(Number<T>::from(b).bits) << 16;
}
template <typename T>
EVIT_DEVICE float low(u32 pair) {
  return to_float(T{static_cast<u16>(pair)});
}
template <typename T>
EVIT_DEVICE float high(u32 pair) {
  return to_float(T{static_cast<u16>(pair >> 16)});
}

// ---- memory: one access of 8 or 16 bytes, at an address that is a multiple of it

template <typename Vector>
EVIT_DEVICE Vector load_vector(const void* p) {
#if defined(__CUDACC_RTC__)
  return *static_cast<const Vector*>(p);
#else
  return emulator::load<Vector>(p);
#endif
}
template <typename Vector>
EVIT_DEVICE void store_vector(void* p, Vector value) {
#if defined(__CUDACC_RTC__)
  *static_cast<Vector*>(p) = value;
#else
  emulator::store(p, value);
#endif
}
EVIT_DEVICE u32x2 load_u32x2(const void* p) { return load_vector<u32x2>(p); }
EVIT_DEVICE u32x4 load_u32x4(const void* p) { return load_vector<u32x4>(p); }
EVIT_DEVICE f32x4 load_f32x4(const float* p) { return load_vector<f32x4>(p); }

// Four or eight neighbours of a tensor as floats, and back: 8 to 32 bytes of it.
template <int N>
EVIT_DEVICE void load_numbers(float* to, const float* p) {
  EVIT_UNROLL
  for (int i = 0; i < N; i += 4) {
    const f32x4 v = load_f32x4(p + i);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}
template <int N, typename T>
EVIT_DEVICE void load_numbers(float* to, const T* p) {
  static_assert(sizeof(T) == 2 && N % 4 == 0);
  u32 pairs[N / 2];
  EVIT_UNROLL
  for (int i = 0; i < N; i += 8) {
    if (N - i >= 8) {
      const u32x4 v = load_u32x4(p + i);
      pairs[i / 2] = v.x, pairs[i / 2 + 1] = v.y, pairs[i / 2 + 2] = v.z, pairs[i / 2 + 3] = v.w;
    } else {
      const u32x2 v = load_u32x2(p + i);
      pairs[i / 2] = v.x, pairs[i / 2 + 1] = v.y;
    }
  }
  EVIT_UNROLL
  for (int i = 0; i < N; i += 2) {
    to[i] = low<T>(pairs[i / 2]);
    to[i + 1] = high<T>(pairs[i / 2]);
  }
}
EVIT_DEVICE void store_4(float* p, const float* x) {
  store_vector(p, f32x4{x[0], x[1], x[2], x[3]});
}
template <typename T>
EVIT_DEVICE void store_4(T* p, const float* x) {
  store_vector(p, u32x2{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])});
}
template <typename T>
EVIT_DEVICE void store_8(T* p, const float* x) {
  if constexpr (sizeof(T) == 2) {
    store_vector(p, u32x4{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                          pack2<T>(x[6], x[7])});
  } else {
    store_4(p, x);
    store_4(p + 4, x + 4);
  }
}

// ---- functions of one number

EVIT_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN, as in eager
EVIT_DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace evit::cuda
