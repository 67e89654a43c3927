#include "common/crc32.h"

#include <string.h>

#include "common/crc32_machine.h"

namespace evit {
namespace {

constexpr int kSlices = 16;

// byte[i][b]: what byte b does to the checksum when i more bytes follow it.
struct Tables {
  uint32_t byte[kSlices][256];
};

constexpr Tables make_tables() {
  Tables t{};
  for (uint32_t b = 0; b < 256; b++) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (crc & 1 ? kCrcPolynomial : 0);
    t.byte[0][b] = crc;
  }
  for (int i = 1; i < kSlices; i++) {
    for (int b = 0; b < 256; b++) {
      const uint32_t before = t.byte[i - 1][b];
      t.byte[i][b] = (before >> 8) ^ t.byte[0][before & 255];
    }
  }
  return t;
}

constexpr Tables kTables = make_tables();

// Four bytes of data, the first of them followed by `after` bytes of the step.
uint32_t four(uint32_t word, int after) {
  return kTables.byte[after][word & 255] ^ kTables.byte[after - 1][word >> 8 & 255] ^
         kTables.byte[after - 2][word >> 16 & 255] ^ kTables.byte[after - 3][word >> 24];
}

}  // namespace

// Sixteen bytes a step by independent table look-ups: their latencies overlap, the dependent chain
// is one look-up and four exclusive-ors a step.
uint32_t crc32_tables(uint32_t crc, const unsigned char* p, size_t bytes) {
  for (; bytes >= kSlices; bytes -= kSlices, p += kSlices) {
    uint32_t w[4];
    memcpy(w, p, sizeof w);  // little-endian machines only, as the file format
    crc = four(w[0] ^ crc, 15) ^ (four(w[1], 11) ^ four(w[2], 7) ^ four(w[3], 3));
  }
  for (; bytes > 0; bytes--, p++) crc = (crc >> 8) ^ kTables.byte[0][(crc ^ *p) & 255];
  return crc;
}

uint32_t crc32(uint32_t crc, const void* data, size_t bytes) {
  static const bool machine = crc32_machine_has();
  const unsigned char* p = static_cast<const unsigned char*>(data);
  return ~(machine ? crc32_machine(~crc, p, bytes) : crc32_tables(~crc, p, bytes));
}

}  // namespace evit
