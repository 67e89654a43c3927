// CUDA device code on the CPU: what csrc/cuda/device.cuh asks for where g++ compiles it.
//
// A CUDA thread is a fibre. Blocks run one after the other; in a block, a warp runs ahead until
// each of its lanes stands at a block barrier or has returned, so a barrier that is missing shows
// as wrong values in at least one of the three orders. A collective (shuffle, matrix product, warp
// barrier) completes when every lane of its mask has arrived at the same line.
//
// What device code does wrong ends the process with status 3 and one line on stderr that names
// block, thread and source line: lanes at different collectives, a barrier that not all threads
// reach, a warp collective that never completes, an asynchronous copy that nobody waits for.
// Shared memory is one heap block of the exact size, filled with NaN bits; the destination of an
// asynchronous copy holds NaN until its group is waited for. Threads of a block are concurrent for
// ThreadSanitizer, ordered by barriers alone; AddressSanitizer sees every access out of bounds.
//
// Not seen: registers, occupancy, clocks, and the order in which a card's memory shows writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum Order { kAscending, kDescending, kShuffled };  // of warps, and of the lanes of a warp

struct Counts {
  long blocks, switches, block_barriers, collectives;
};

struct Launch {
  Index grid, block;
  size_t shared_bytes = 0;
  Order order = kAscending;
  unsigned seed = 0;
};

// Runs `thread` once for every thread of every block.
Counts run(const Launch& launch, const std::function<void()>& thread);

// Calls kernel(args...) in every thread; args as cuLaunchKernel takes them, one pointer to each.
template <typename... A, size_t... I>
Counts run_kernel(void (*kernel)(A...), const Launch& launch, void** args,
                  std::index_sequence<I...>) {
  return run(launch, [&] { kernel(*static_cast<A*>(args[I])...); });
}
template <typename... A>
Counts run_kernel(void (*kernel)(A...), const Launch& launch, void** args) {
  return run_kernel(kernel, launch, args, std::index_sequence_for<A...>());
}

// ---- what a running thread sees of itself

struct Thread {
  Index index;
  int rank;  // in its block
};
struct Block {
  Index index, size, grid;
  unsigned char* shared;
};
extern thread_local Thread* thread;
extern thread_local Block* block;

inline int lane() { return thread->rank % 32; }

// ---- what a thread does together with others. `where` is the caller's line, for the messages.

struct Where {
  const char* file;
  int line;
};
#define EMULATOR_WHERE \
  ::emulator::Where where = ::emulator::Where { __builtin_FILE(), __builtin_LINE() }

void sync_block(EMULATOR_WHERE);
void sync_warp(unsigned mask, EMULATOR_WHERE);

constexpr int kExchangeBytes = 64;
// The bytes that every lane of the mask brought, by lane: valid until this lane's next collective.
using Exchanged = const unsigned char (*)[kExchangeBytes];
Exchanged exchange_bytes(unsigned mask, const void* bytes, int count, Where where);

// What one lane brought.
template <typename T>
T brought(Exchanged lanes, int lane) {
  T value;
  std::memcpy(&value, lanes[lane], sizeof value);
  return value;
}
template <typename T>
Exchanged exchange(unsigned mask, const T& value, EMULATOR_WHERE) {
  static_assert(sizeof(T) <= kExchangeBytes, "a lane brings at most 64 bytes");
  return exchange_bytes(mask, &value, sizeof value, where);
}
template <typename T>
T shuffle(unsigned mask, T value, int from, EMULATOR_WHERE) {
  return brought<T>(exchange(mask, value, where), from & 31);
}
template <typename T>
T shuffle_xor(unsigned mask, T value, int bits, EMULATOR_WHERE) {
  return brought<T>(exchange(mask, value, where), (lane() ^ bits) & 31);
}

// ---- asynchronous copies of this thread: 16 bytes from global to shared memory

void copy_async(void* shared, const void* global, bool inside, EMULATOR_WHERE);
void commit_copies();
void wait_copies(int groups_in_flight);  // all groups but the youngest so many are complete then

// An address that the hardware would refuse ends the process.
void require_aligned(const void* address, size_t bytes, EMULATOR_WHERE);

}  // namespace emulator
