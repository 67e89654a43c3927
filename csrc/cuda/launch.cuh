// What a launch takes. Each op's file ends in constexpr functions that say it for its kernels; g++
// compiles them into the native library, whose launcher asks them.
#pragma once

#include "types.cuh"

namespace evit::cuda {

struct LaunchShape {
  i64 blocks_x, blocks_y;
  int threads, shared_bytes;
  int blocks_per_sm = 1;  // that the compiler keeps registers free for
};

// How the numbers of a tensor are stored.
constexpr int kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kUint8 = 3;

template <int kind>
struct NumberOf {
  using Type = float;
};
template <>
struct NumberOf<kFloat16> {
  using Type = f16;
};
template <>
struct NumberOf<kBfloat16> {
  using Type = bf16;
};
template <>
struct NumberOf<kUint8> {
  using Type = u8;
};

// A tile family is named by its first architecture; 0 is float32, without tensor cores.
EVIT_HOST_DEVICE int number_bytes(int family) { return family == 0 ? 4 : 2; }

// The smallest distance of at least n numbers between rows in shared memory at which a tile's loads
// meet no bank twice. n is a multiple of 16.
//   sm_70: 16-byte loads of eight neighbouring rows: an odd multiple of 16 bytes
//   sm_75, sm_80: 8-byte loads: 32 bytes more than a multiple of 64
//   float32: 16-byte loads of eight rows: 16 bytes more than a multiple of 128
EVIT_HOST_DEVICE int row_stride(int family, int n) {
  if (family == 70) return n + 8;
  if (family == 0) return n + (36 - n % 32) % 32;
  return n % 32 == 16 ? n : n + 16;
}

// Arguments of a kernel's body, `void (const Args&)`: pointers and 64-bit integers only.
template <typename Body>
struct ArgsOf;
template <typename Args>
struct ArgsOf<void (*)(const Args&)> {
  using Type = Args;
};

EVIT_HOST_DEVICE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

}  // namespace evit::cuda
