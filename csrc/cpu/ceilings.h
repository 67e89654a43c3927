// Loops that do nothing but reach a ceiling of one core: what a kernel's speed is a share of.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace evit::cpu {

struct Ceilings {
  const char* name;
  // `steps` times kFmaChains multiply-adds of `lanes` floats, all in registers, none waiting for
  // another of its step. Returns a value that depends on all of them.
  float (*fma)(int64_t steps);
  int chains;
  int lanes;
  float (*read)(const float* x, int64_t n);           // n: floats, a multiple of 128
  void (*copy)(const float* x, float* y, int64_t n);  // the same
};

}  // namespace evit::cpu
