// Memory traffic of a launch, in builds with EMULATOR_COUNTS. Every access of the device code is
// seen: vectors by emulator::load and store, all others by the calls that g++ -fsanitize=thread
// writes before each access, which counts.cpp answers in ThreadSanitizer's place.
//
// The lanes of a warp run one after the other; accesses become a warp's instruction again by the
// call path and how often a lane has come there since the warp last stood together. Lanes that
// leave a loop's turn early are matched by number, not by turn.
#pragma once

namespace emulator {

constexpr int kSectorBytes = 32;
constexpr int kBanks = 32, kBankBytes = 4;

struct BufferCounts {
  long instructions;                     // of a warp, that touch it
  long sectors;                          // of all instructions: what L1 is asked for
  long distinct_read, distinct_written;  // sectors of the launch
};
struct SharedCounts {
  long instructions, conflict_free;
  long wavefronts, least_wavefronts;  // turns of the banks; as few as the access's width allows
};

// For the runtime.
void count_block(int threads);  // a block begins
void count_step(int warp);      // all lanes of the warp stand together

}  // namespace emulator

extern "C" {
// Buffers of global memory whose traffic counts; the counts start at zero.
void watch(int buffers, const void* const* addresses, const long* bytes);
void counts(emulator::BufferCounts* buffers, emulator::SharedCounts* shared);
}
