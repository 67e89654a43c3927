// CRC-32 by the machine's own instructions: carry-less multiplication on x86-64, the CRC extension
// on aarch64. Each function carries its instruction set as an attribute and is called only where
// the running machine has it; the file itself is compiled for the baseline.
#include "common/crc32_machine.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <string.h>
#include <sys/auxv.h>
#endif

namespace evit {

#if defined(__x86_64__)
namespace {

// x^n modulo the polynomial, bits reversed, one to the left: the factor that moves 64 bits of data
// n bits on (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ").
constexpr long long power(int n) {
  uint32_t r = 0x80000000u;
  for (int i = 0; i < n; i++) r = (r >> 1) ^ (r & 1 ? kCrcPolynomial : 0);
  return static_cast<long long>(uint64_t{r} << 1);
}
static_assert(power(4 * 128 + 32) == 0x154442bd4 && power(4 * 128 - 32) == 0x1c6e41596);

// The 16 bytes `x`, moved `kBytes` on, added to the data there.
template <int kBytes>
__attribute__((target("pclmul"))) inline __m128i fold(__m128i x, __m128i data) {
  const __m128i by = _mm_set_epi64x(power(8 * kBytes - 32), power(8 * kBytes + 32));
  return _mm_xor_si128(
      _mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), data);
}

__m128i load(const unsigned char* p) { return _mm_loadu_si128((const __m128i*)p); }

}  // namespace

bool crc32_machine_has() { return __builtin_cpu_supports("pclmul"); }

// Four chains hide the latency of the multiplication; a fifth of the tables' time.
__attribute__((target("pclmul"))) uint32_t crc32_machine(uint32_t crc, const unsigned char* p,
                                                         size_t bytes) {
  if (bytes < 64) return crc32_tables(crc, p, bytes);
  __m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128(static_cast<int>(crc)));
  __m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);
  for (p += 64, bytes -= 64; bytes >= 64; p += 64, bytes -= 64) {
    a = fold<64>(a, load(p));
    b = fold<64>(b, load(p + 16));
    c = fold<64>(c, load(p + 32));
    d = fold<64>(d, load(p + 48));
  }
  a = fold<16>(fold<16>(fold<16>(a, b), c), d);
  unsigned char rest[16];
  _mm_storeu_si128((__m128i*)rest, a);
  return crc32_tables(crc32_tables(0, rest, sizeof rest), p, bytes);
}

#elif defined(__aarch64__)

bool crc32_machine_has() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }

__attribute__((target("+crc"))) uint32_t crc32_machine(uint32_t crc, const unsigned char* p,
                                                       size_t bytes) {
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    crc = __crc32d(crc, word);
  }
  for (; bytes > 0; bytes--, p++) crc = __crc32b(crc, *p);
  return crc;
}

#else

bool crc32_machine_has() { return false; }
uint32_t crc32_machine(uint32_t crc, const unsigned char* p, size_t bytes) {
  return crc32_tables(crc, p, bytes);
}

#endif

}  // namespace evit
