// The instruction sets of the CPU column, lowest first: name, compiler flags. The build, the
// dispatch, the tests and explain() all read this list; the check that the running machine has one
// is in runtime/dispatch.cpp.
#pragma once

#define EVIT_ISAS_X86(X)  \
  X(scalar, "")           \
  X(avx2, "-mavx2 -mfma") \
  X(avx512, "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512")

#define EVIT_ISAS_ARM(X) \
  X(scalar, "")          \
  X(neon, "")

#if defined(__x86_64__)
#define EVIT_ISAS(X) EVIT_ISAS_X86(X)
#else
#define EVIT_ISAS(X) EVIT_ISAS_ARM(X)
#endif
