#include "runtime/ceilings.h"

#include <chrono>
#include <vector>

#include "cpu/ceilings.h"
#include "cpu/isa.h"
#include "runtime/dispatch.h"

namespace evit {
namespace cpu {
#define EVIT_DECLARE(name, flags)  \
  namespace name {                 \
  extern const Ceilings kCeilings; \
  }
EVIT_ISAS(EVIT_DECLARE)
#undef EVIT_DECLARE
}  // namespace cpu

namespace {

#define EVIT_TABLE(name, flags) &cpu::name::kCeilings,
constexpr const cpu::Ceilings* kTables[] = {EVIT_ISAS(EVIT_TABLE)};
#undef EVIT_TABLE

constexpr int64_t kBlock = 128;  // floats: the read and copy loops take whole blocks
constexpr int kAdds = 64;        // dependent additions of a clock step

volatile float g_sink;

// Additions that wait for each other, a cycle each. Register and register: a constant could be
// folded away at register renaming.
int64_t clock_loop(int64_t steps) {
  uint64_t x = 1, y = 3;
  asm volatile("" : "+r"(x), "+r"(y));
  for (int64_t t = 0; t < steps; t++) {
#pragma GCC unroll 64
    for (int i = 0; i < kAdds; i++) {
      x += y;
      asm volatile("" : "+r"(x));
    }
  }
  return (int64_t)x;
}

}  // namespace

bool time_ceiling(const std::string& loop, const std::string& isa, int64_t steps, void* buffer,
                  size_t bytes, CeilingTime* out, std::string* error) {
  const cpu::Ceilings* table = nullptr;
  for (const std::string& name : available_isas())
    for (const cpu::Ceilings* t : kTables)
      if (name == isa && name == t->name) table = t;
  if (!table) {
    *error = "ceiling: this machine has no instruction set '" + isa + "'";
    return false;
  }
  const bool moves = loop == "read" || loop == "copy";
  const int64_t n = (int64_t)(bytes / sizeof(float)) / (loop == "copy" ? 2 : 1) / kBlock * kBlock;
  if (moves && n == 0) {
    *error = "ceiling: " + loop + " needs a buffer of at least 1024 bytes";
    return false;
  }
  float* x = (float*)buffer;
  *out = {};
  const auto start = std::chrono::steady_clock::now();
  if (loop == "clock") {
    g_sink = (float)clock_loop(steps);
    out->amount = (double)steps * kAdds;
  } else if (loop == "fma") {
    g_sink = table->fma(steps);
    out->ops = (double)steps * table->chains;
    out->amount = 2.0 * out->ops * table->lanes;
  } else if (loop == "read") {
    for (int64_t t = 0; t < steps; t++) g_sink = table->read(x, n);
    out->amount = (double)steps * n * sizeof(float);
  } else if (loop == "copy") {
    for (int64_t t = 0; t < steps; t++) table->copy(x, x + n, n);
    out->amount = 2.0 * steps * n * sizeof(float);
  } else {
    *error = "ceiling: unknown loop '" + loop + "'; expected clock, fma, read or copy";
    return false;
  }
  out->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return true;
}

}  // namespace evit
