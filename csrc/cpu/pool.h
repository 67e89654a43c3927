// The library's threads, and the barrier they meet at. Sized by each call; nothing here allocates
// or throws.
#pragma once

namespace evit {

constexpr int kMaxThreads = 256;

int usable_cpus();  // of this process, by its affinity mask

using TeamFn = void (*)(void* ctx, int rank, int size);

// Runs fn(ctx, rank, size) once for every rank below size and returns when all have; rank 0 is the
// calling thread. size is `threads`, or less where the system gives fewer, and 1 when another
// thread is using the pool (or fn itself calls): then the caller works alone, at once. fn must not
// throw.
void pool_run(int threads, TeamFn fn, void* ctx);

// A barrier for the ranks of one pool_run. Waits spinning, then yielding, so it stays live when
// there are more threads than cores. Zero-initialise it; it may be used any number of times, always
// by the same number of ranks.
class SpinBarrier {
 public:
  void wait(int size);

 private:
  // Apart, so that arriving ranks do not disturb the line that the others are watching; by two
  // lines, which prefetchers fetch in pairs (M0, one image, two ranks: 1.0 ms, or 1.4 by the
  // stack's luck).
  alignas(128) unsigned arrived_ = 0;
  alignas(128) unsigned generation_ = 0;
  unsigned vain_ = 0;  // waits that spun to the end: the rank may hold the processor of another
};

}  // namespace evit
