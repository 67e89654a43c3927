#include "runtime/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

namespace evit {
namespace cpu {
#define EVIT_DECLARE(name, flags) \
  namespace name {                \
  extern const Kernels kKernels;  \
  namespace stages {              \
  extern const Kernels kKernels;  \
  }                               \
  }
EVIT_ISAS(EVIT_DECLARE)
#undef EVIT_DECLARE
}  // namespace cpu

namespace {

bool machine_has(const char* name) {
  if (std::strcmp(name, "scalar") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           machine_has("avx2");
  }
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon") == 0) return true;  // part of every aarch64
#endif
  return false;
}

#define EVIT_TABLE(name, flags) &cpu::name::kKernels,
constexpr const cpu::Kernels* kTables[] = {EVIT_ISAS(EVIT_TABLE)};
#undef EVIT_TABLE
#define EVIT_TABLE(name, flags) &cpu::name::stages::kKernels,
constexpr const cpu::Kernels* kStageTables[] = {EVIT_ISAS(EVIT_TABLE)};
#undef EVIT_TABLE
constexpr int kTableCount = sizeof(kTables) / sizeof(kTables[0]);

// Highest table that the machine has among the first `limit`.
const cpu::Kernels* highest(int limit) {
  for (int i = limit - 1; i > 0; i--)
    if (machine_has(kTables[i]->name)) return kTables[i];
  return kTables[0];
}

std::atomic<const cpu::Kernels*> g_kernels{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : kTables)
    if (machine_has(k->name)) names.push_back(k->name);
  return names;
}

bool set_max_isa(const char* name, std::string* error) {
  int limit = name ? 0 : kTableCount;
  std::string known;
  for (int i = 0; i < kTableCount && name; i++) {
    known += std::string(i ? ", " : "") + kTables[i]->name;
    if (std::strcmp(kTables[i]->name, name) == 0) limit = i + 1;
  }
  if (limit == 0) {
    *error = "unknown instruction set '" + std::string(name) + "'; expected one of " + known +
             " (EVIT_FAST_MAX_ISA or set_max_isa)";
    return false;
  }
  g_kernels.store(highest(limit), std::memory_order_release);
  return true;
}

const cpu::Kernels* kernels(std::string* error) {
  const cpu::Kernels* k = g_kernels.load(std::memory_order_acquire);
  if (k) return k;
  const char* cap = std::getenv("EVIT_FAST_MAX_ISA");
  if (!set_max_isa(cap && *cap ? cap : nullptr, error)) return nullptr;
  return g_kernels.load(std::memory_order_acquire);
}

const cpu::Kernels* stage_kernels(const cpu::Kernels* k) {
  int i = 0;
  while (kTables[i] != k) i++;
  return kStageTables[i];
}

}  // namespace evit
