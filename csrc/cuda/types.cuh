// Types and marks of the device code, and of the constexpr functions that g++ compiles too.
#pragma once

#if defined(__CUDACC_RTC__)
#define EVIT_DEVICE __device__ __forceinline__
#define EVIT_HOST_DEVICE __host__ __device__ constexpr
#define EVIT_KERNEL(threads, blocks_per_sm) \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
#define EVIT_RESTRICT __restrict__
#define EVIT_UNROLL _Pragma("unroll")
#else
#define EVIT_DEVICE inline
#define EVIT_HOST_DEVICE constexpr
#define EVIT_KERNEL(threads, blocks_per_sm) inline void
#define EVIT_RESTRICT __restrict
#define EVIT_UNROLL
#endif

namespace evit::cuda {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(16) f32x4 {
  float x, y, z, w;
};

}  // namespace evit::cuda
