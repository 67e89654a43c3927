// One rank's view of the threads that run a kernel together. Instruction-set files include this: no
// templates here, and sync() must not be emitted as a shared (weak) function.
#pragma once

#include "cpu/pool.h"

namespace evit {

struct Team {
  int rank, size;
  SpinBarrier* barrier;  // unused, and may be null, when size is 1

  // Everything that any rank wrote before is visible to every rank afterwards.
  __attribute__((always_inline)) inline void sync() const {
    if (size > 1) barrier->wait(size);
  }
};

}  // namespace evit
