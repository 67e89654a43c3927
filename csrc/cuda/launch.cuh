// What a launch takes. Each op's file ends in constexpr functions that say it for its kernels; g++
// compiles them into the native library, whose launcher asks them.
#pragma once

#include "device.cuh"

namespace evit::cuda {

struct LaunchShape {
  i64 blocks_x, blocks_y;
  int threads, shared_bytes;
};

EVIT_HOST_DEVICE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

}  // namespace evit::cuda
