// Measures the ceilings of this machine, one loop at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace evit {

struct CeilingTime {
  double seconds;
  double amount;  // clock: cycles; fma: floating-point operations; read, copy: bytes moved
  double ops;     // fma: vector multiply-adds; else 0
};

// Runs `loop` (clock, fma, read or copy) with one instruction set's kernels, `steps` times over.
// read and copy pass over the caller's buffer (64-byte aligned, copy: from its first half to its
// second); the others leave it alone. False and one sentence on an unknown name or a small buffer.
bool time_ceiling(const std::string& loop, const std::string& isa, int64_t steps, void* buffer,
                  size_t bytes, CeilingTime* out, std::string* error);

}  // namespace evit
