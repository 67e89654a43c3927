// The two ways that common/crc32.h chooses from. Both take and return the register, whose bits are
// those of the checksum inverted, and give equal results.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace evit {

constexpr uint32_t kCrcPolynomial = 0xEDB88320u;

uint32_t crc32_tables(uint32_t crc, const unsigned char* p, size_t bytes);

bool crc32_machine_has();  // whether crc32_machine may be called
uint32_t crc32_machine(uint32_t crc, const unsigned char* p, size_t bytes);

}  // namespace evit
