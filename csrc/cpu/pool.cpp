// Threads that wait for work: each watches its own state word, first spinning, then asleep on it as
// a futex. A call wakes its ranks as a binary tree. The pool is one static object without a
// destructor: nothing is left to leak, and a late call finds it intact.
#include "cpu/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace evit {
namespace {

// An idle worker spins this long before it sleeps: the time between two forwards of a busy program.
// A wake-up from sleep costs about as much.
constexpr int64_t kSpinNs = 50'000;
constexpr int kPausesPerLook = 32;

void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Spins until done() holds, for at most `ns`; says whether it held.
template <typename Done>
bool spin_until(int64_t ns, Done done) {
  if (done()) return true;
  if (ns == 0) return false;
  for (const int64_t end = now_ns() + ns; now_ns() < end;) {
    for (int i = 0; i < kPausesPerLook; i++) {
      if (done()) return true;
      cpu_pause();
    }
  }
  return false;
}

enum State : uint32_t { kIdle, kAsleep, kGo, kStop };

struct alignas(64) Worker {
  std::atomic<uint32_t> state;
  pthread_t thread;
};

struct Pool {
  std::atomic<bool> busy;
  int workers;  // threads alive; worker i has rank i + 1. This and the fields below belong to
                // whoever set busy.
  int cpus;     // usable by this process when the pool last grew
  bool fork_handled;

  TeamFn fn;
  void* ctx;
  int size;
  int caller_cpu;   // where rank 0 runs; -1 when there are more ranks than cores
  int64_t spin_ns;  // 0 when there are more ranks than cores: spinning would keep the others from
                    // running

  // Ranks still running, and whether the caller sleeps on this word.
  alignas(64) std::atomic<uint32_t> pending;
  Worker worker[kMaxThreads - 1];
};
constexpr uint32_t kCallerAsleep = 1u << 31;

Pool g_pool;  // zero-initialised: idle, without threads

void signal_worker(Worker* worker, State state) {
  if (worker->state.exchange(state, std::memory_order_acq_rel) == kAsleep) {
    futex_wake(&worker->state);
  }
}

// A thread often wakes on the processor of the one that woke it, and stays there as long as the
// others are not idle: two ranks then take turns. Leaves the processor, free to come back later.
void leave(int cpu) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
}

void wake_children(int rank, int size) {
  for (int child = 2 * rank + 1; child <= 2 * rank + 2 && child < size; child++) {
    signal_worker(&g_pool.worker[child - 1], kGo);
  }
}

void* worker_main(void* arg) {
  Worker* self = static_cast<Worker*>(arg);
  const int rank = static_cast<int>(self - g_pool.worker) + 1;
  int64_t spin_ns = 0;
  for (;;) {
    uint32_t state = kIdle;
    const bool found = spin_until(spin_ns, [&] {
      state = self->state.load(std::memory_order_acquire);
      return state != kIdle;
    });
    if (!found && self->state.compare_exchange_strong(state, kAsleep, std::memory_order_acq_rel)) {
      do {
        futex_wait(&self->state, kAsleep);
        state = self->state.load(std::memory_order_acquire);
      } while (state == kAsleep);
    }
    if (state == kStop) return nullptr;
    self->state.store(kIdle, std::memory_order_relaxed);
    const TeamFn fn = g_pool.fn;
    void* const ctx = g_pool.ctx;
    const int size = g_pool.size;
    spin_ns = g_pool.spin_ns;
    wake_children(rank, size);
    if (sched_getcpu() == g_pool.caller_cpu) leave(g_pool.caller_cpu);
    fn(ctx, rank, size);
    if (g_pool.pending.fetch_sub(1, std::memory_order_acq_rel) == (kCallerAsleep | 1)) {
      futex_wake(&g_pool.pending);
    }
  }
}

void wait_for_workers() {
  uint32_t left = 0;
  spin_until(g_pool.spin_ns, [&] {
    left = g_pool.pending.load(std::memory_order_acquire);
    return left == 0;
  });
  while ((left & ~kCallerAsleep) != 0) {
    if (!g_pool.pending.compare_exchange_weak(left, left | kCallerAsleep,
                                              std::memory_order_acq_rel)) {
      continue;
    }
    futex_wait(&g_pool.pending, left | kCallerAsleep);
    left = g_pool.pending.load(std::memory_order_acquire);
  }
}

// In the child of a fork none of the workers exists, and whoever held the pool may not either.
void forget_workers() {
  g_pool.workers = 0;
  g_pool.pending.store(0, std::memory_order_relaxed);
  g_pool.busy.store(false, std::memory_order_relaxed);
}

// Makes the pool `threads - 1` workers strong if the system allows; returns the ranks there are.
// Workers beyond a smaller call stay asleep: ending and starting them again would cost more than
// they do.
int grow(int threads) {
  if (g_pool.workers >= threads - 1) return threads;
  if (!g_pool.fork_handled) {
    g_pool.fork_handled = pthread_atfork(nullptr, nullptr, forget_workers) == 0;
    if (!g_pool.fork_handled) return 1;
  }
  g_pool.cpus = usable_cpus();
  // Workers take no signals: the program's handlers run on the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (g_pool.workers < threads - 1) {
    Worker* worker = &g_pool.worker[g_pool.workers];
    worker->state.store(kIdle, std::memory_order_relaxed);
    if (pthread_create(&worker->thread, nullptr, worker_main, worker) != 0) break;
    pthread_setname_np(worker->thread, "evit_fast");
    g_pool.workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return g_pool.workers + 1;
}

// At exit, or when the library is unloaded: no thread may be left in code that goes away. If a call
// is still running, the process is ending under it, and waiting could only hang.
__attribute__((destructor)) void stop_workers() {
  if (g_pool.busy.exchange(true, std::memory_order_acquire)) return;
  for (int i = 0; i < g_pool.workers; i++) signal_worker(&g_pool.worker[i], kStop);
  for (int i = 0; i < g_pool.workers; i++) pthread_join(g_pool.worker[i].thread, nullptr);
  g_pool.workers = 0;
}

}  // namespace

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));  // more than a cpu_set_t holds
}

void pool_run(int threads, TeamFn fn, void* ctx) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1 || g_pool.busy.exchange(true, std::memory_order_acquire)) {
    fn(ctx, 0, 1);
    return;
  }
  const int size = grow(threads);
  g_pool.fn = fn;
  g_pool.ctx = ctx;
  g_pool.size = size;
  g_pool.spin_ns = size <= g_pool.cpus ? kSpinNs : 0;
  g_pool.caller_cpu = size <= g_pool.cpus ? sched_getcpu() : -1;
  g_pool.pending.store(static_cast<uint32_t>(size - 1), std::memory_order_relaxed);
  wake_children(0, size);
  fn(ctx, 0, size);
  wait_for_workers();
  g_pool.busy.store(false, std::memory_order_release);
}

void SpinBarrier::wait(int size) {
  // About 50 us of pauses: longer than ranks of balanced work differ, shorter than a time slice.
  constexpr int kSpins = 1000;
  const unsigned generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == static_cast<unsigned>(size)) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  // Ranks that share a processor would spin away each other's time at every one of a hundred
  // barriers: a wait in vain halves those that follow. (The first may be one for a rank that
  // wakes.)
  const unsigned vain = size > g_pool.cpus ? 31 : __atomic_load_n(&vain_, __ATOMIC_RELAXED);
  for (int i = 0; i < kSpins >> vain; i++) {
    if (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation) return;
    cpu_pause();
  }
  if (vain < 31) __atomic_store_n(&vain_, vain + 1, __ATOMIC_RELAXED);
  while (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation) sched_yield();
}

}  // namespace evit
