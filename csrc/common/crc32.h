// CRC-32 as zlib computes it (reflected polynomial 0xEDB88320): the checksum of a saved model.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace evit {

// The checksum of everything seen so far: start with 0, pass the result on. crc32(0, "123456789",
// 9) = 0xCBF43926.
uint32_t crc32(uint32_t crc, const void* data, size_t bytes);

}  // namespace evit
