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
// asynchronous copy holds NaN until its group is waited for. Threads of a launch are concurrent for
// ThreadSanitizer, ordered by barriers alone; AddressSanitizer sees every access out of bounds.
// With EMULATOR_COUNTS the sectors and bank conflicts of a launch are counted (counts.h).
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
  size_t shared_bytes;
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
struct Bytes {
  uint64_t word[kExchangeBytes / 8];
};
Exchanged exchange_bytes(unsigned mask, const Bytes& bytes, Where where);

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
  Bytes bytes = {};
  std::memcpy(&bytes, &value, sizeof value);
  return exchange_bytes(mask, bytes, where);
}
template <typename T>
T shuffle(unsigned mask, T value, int from, EMULATOR_WHERE) {
  return brought<T>(exchange(mask, value, where), from & 31);
}
template <typename T>
T shuffle_xor(unsigned mask, T value, int bits, EMULATOR_WHERE) {
  return brought<T>(exchange(mask, value, where), (lane() ^ bits) & 31);
}

// ---- memory

#if defined(EMULATOR_COUNTS)
// Counting needs the addresses of a launch, not its results: products are left out.
constexpr bool kCounts = true;
// Out of line and without the compiler's own calls: one access is counted once, at its caller.
#define EMULATOR_ACCESS __attribute__((noinline, no_sanitize_thread))
void count_access(const void* address, size_t bytes, bool writes, const void* caller);
#else
constexpr bool kCounts = false;
#define EMULATOR_ACCESS inline
inline void count_access(const void*, size_t, bool, const void*) {}
#endif

// An address that the hardware would refuse ends the process.
void require_aligned(const void* address, size_t bytes, EMULATOR_WHERE);

// A vector in one access.
template <typename Vector>
EMULATOR_ACCESS Vector load(const void* p, EMULATOR_WHERE) {
  require_aligned(p, sizeof(Vector), where);
  count_access(p, sizeof(Vector), false, __builtin_return_address(0));
  return *static_cast<const Vector*>(p);
}
template <typename Vector>
EMULATOR_ACCESS void store(void* p, Vector value, EMULATOR_WHERE) {
  require_aligned(p, sizeof(Vector), where);
  count_access(p, sizeof(Vector), true, __builtin_return_address(0));
  *static_cast<Vector*>(p) = value;
}

// ---- asynchronous copies of this thread: 16 bytes from global to shared memory. They read and
// write here, in the device code's own compilation: a sanitizer sees both.

struct alignas(16) Sixteen {
  uint64_t word[2];
};
struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};
void start_copy(void* to, const void* from, Where where);
bool next_complete(int groups_in_flight, Copy& copy);  // takes it off the list
void commit_copies();

inline void copy_async(void* shared, const void* global, bool inside, EMULATOR_WHERE) {
  store(shared, Sixteen{{~uint64_t{0}, ~uint64_t{0}}}, where);
  if (inside) require_aligned(global, sizeof(Sixteen), where);
  if (kCounts && inside) load<Sixteen>(global);
  start_copy(shared, inside ? global : nullptr, where);
}
// All groups but the youngest so many are complete then.
inline void wait_copies(int groups_in_flight) {
  for (Copy copy; next_complete(groups_in_flight, copy);) {
    if (kCounts) continue;
    Sixteen value = {};
    if (copy.from) value = *static_cast<const Sixteen*>(copy.from);
    *static_cast<Sixteen*>(copy.to) = value;
  }
}

}  // namespace emulator
