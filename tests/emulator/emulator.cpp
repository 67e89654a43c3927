// The emulator's runtime. Never compiled with -fsanitize: its own switching would be seen as races.
// The sanitizers' entry points are weak, there only in a program that links one.
//
// For ThreadSanitizer the blocks of a launch are concurrent too, as on a card: each has shared
// memory, stacks and barriers at addresses of its own, and only the launch's end waits for them.
#include "emulator.h"

#include "counts.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <vector>

extern "C" {
#define WEAK __attribute__((weak))
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#undef WEAK

// Saves the callee's registers and the stack pointer in *save and goes on where `load` was saved.
void emulator_switch(void** save, void* load);
}
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

namespace emulator {

thread_local Thread* thread;
thread_local Block* block;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kMostCopies = 1024;  // of a thread in flight, at the far end of its stack
// TSan has 8128 and takes a thread for the earlier one whose number it has: blocks race only with
// those whose threads are still there.
constexpr size_t kMostTsanFibres = 4096;
constexpr int kSavedRegisters = 6;
constexpr unsigned kUnordered = 1;  // a switch orders nothing: threads stay concurrent for TSan

enum State : uint8_t { kRuns, kAtBlockBarrier, kAtCollective, kReturned };

struct Fibre : Thread {
  void* stack_pointer;
  char* stack;
  State state;
  Where where;
  unsigned mask;  // of the collective it waits at
  Bytes brings;   // assigned whole: a call of memcpy would be seen by TSan, as this thread's access
  unsigned char parity;             // of its collectives, for TSan
  int group;                        // of the copies that it starts
  unsigned oldest_copy, next_copy;  // of a ring of kMostCopies
  void* tsan;
  void* fake_stack;  // of ASan
};

struct Warp {
  Bytes brought[32];
  unsigned char parity[32];
};

// What TSan releases and acquires.
struct Sync {
  char barrier[2];                            // by parity
  std::vector<std::array<char, 64>> arrived;  // by warp, lane and parity
};

struct Running : Block {
  int threads;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  void* stack_pointer;  // of the scheduler
  const std::function<void()>* body;
  Counts counts;
  std::vector<std::unique_ptr<Sync>> syncs;       // of the blocks; without TSan they share one
  std::vector<void*> tsan_fibres, shared_blocks;  // not yet freed
  char end;                                       // for TSan, as the above
  void* tsan;
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_size;
};

thread_local Running* running;

Fibre* self() { return static_cast<Fibre*>(thread); }

[[noreturn]] void fail(const char* what, Where where, int rank) {
  const Index& b = block->index;
  fprintf(stderr, "emulator: block (%u, %u, %u) thread %d: %s [%s:%d]\n", b.x, b.y, b.z, rank, what,
          where.file ? where.file : "?", where.line);
  fflush(stderr);
  _Exit(3);
}

Copy& ring_copy(const Fibre* fibre, unsigned i) {
  return reinterpret_cast<Copy*>(fibre->stack)[i % kMostCopies];
}

bool same(Where a, Where b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

void release(char* address) {
  if (__tsan_release) __tsan_release(address);
}
void acquire(char* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

void to_scheduler() {
  Fibre* fibre = self();
  running->counts.switches++;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(running->tsan, kUnordered);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fibre->state == kReturned ? nullptr : &fibre->fake_stack,
                                   running->stack_bottom, running->stack_size);
  }
  emulator_switch(&fibre->stack_pointer, running->stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(self()->fake_stack, nullptr, nullptr);
  }
}

void resume(Fibre& fibre) {
  thread = &fibre;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fibre.tsan, kUnordered);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&running->fake_stack, fibre.stack, kStackBytes);
  }
  emulator_switch(&running->stack_pointer, fibre.stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(running->fake_stack, nullptr, nullptr);
  }
}

// Where a fibre begins.
void enter() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &running->stack_bottom, &running->stack_size);
  }
  (*running->body)();
  Fibre* fibre = self();
  if (fibre->oldest_copy != fibre->next_copy) {
    fail("returned with an asynchronous copy in flight; wait for it", fibre->where, fibre->rank);
  }
  fibre->state = kReturned;
  release(&running->end);
  to_scheduler();
  abort();
}

void begin(Fibre& fibre, int rank, const Index& size) {
  fibre.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
  fibre.rank = rank;
  fibre.state = kRuns;
  fibre.where = {};
  fibre.parity = 0;
  fibre.group = 0;
  fibre.oldest_copy = fibre.next_copy = 0;
  fibre.fake_stack = nullptr;
  auto** top = reinterpret_cast<void**>(fibre.stack + kStackBytes - 64);
  *--top = nullptr;  // the return address of enter(): its stack is aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
  fibre.stack_pointer = top;
  if (__tsan_create_fiber) {
    fibre.tsan = __tsan_create_fiber(0);
    char name[32];
    snprintf(name, sizeof name, "CUDA thread %d", rank);
    __tsan_set_fiber_name(fibre.tsan, name);
  }
}

void wait_at_collective(unsigned mask, Where where) {
  Fibre* fibre = self();
  const int lane = fibre->rank % 32;
  if (!(mask >> lane & 1)) fail("a lane that is not in its own mask", where, fibre->rank);
  Warp& warp = running->warps[fibre->rank / 32];
  fibre->state = kAtCollective;
  fibre->where = where;
  fibre->mask = mask;
  fibre->parity ^= 1;
  auto& arrived = running->syncs.back()->arrived[fibre->rank / 32];
  release(&arrived[lane * 2 + fibre->parity]);
  to_scheduler();
  for (int i = 0; i < 32; i++) {
    if (mask >> i & 1) acquire(&arrived[i * 2 + warp.parity[i]]);
  }
}

// Lets every complete collective of a warp go on; says whether there was one.
bool complete_collectives(Warp& warp, Fibre* lanes, int size) {
  unsigned seen = 0;
  bool any = false;
  for (int first = 0; first < size; first++) {
    if (lanes[first].state != kAtCollective || seen >> first & 1) continue;
    const unsigned mask = lanes[first].mask;
    bool complete = true;
    for (int i = 0; i < 32 && complete; i++) {
      if (!(mask >> i & 1)) continue;
      complete = i < size && lanes[i].state == kAtCollective && lanes[i].mask == mask;
      if (complete && !same(lanes[i].where, lanes[first].where)) {
        fail("lanes of one warp wait at different collectives", lanes[i].where, lanes[i].rank);
      }
    }
    if (!complete) continue;
    seen |= mask;
    any = true;
    running->counts.collectives++;
    for (int i = 0; i < 32; i++) {
      if (!(mask >> i & 1)) continue;
      warp.brought[i] = lanes[i].brings;
      warp.parity[i] = lanes[i].parity;
      lanes[i].state = kRuns;
    }
  }
  return any;
}

class Permutation {
 public:
  Permutation(int size, Order order) : items_(size), shuffled_(order == kShuffled) {
    for (int i = 0; i < size; i++) items_[i] = order == kDescending ? size - 1 - i : i;
  }
  const std::vector<int>& next(std::mt19937& random) {
    if (shuffled_) std::shuffle(items_.begin(), items_.end(), random);
    return items_;
  }

 private:
  std::vector<int> items_;
  bool shuffled_;
};

// Runs one warp until none of its lanes can go on; says whether any ran.
bool run_warp(Running& b, int index, Order order, std::mt19937& random) {
  const int size = std::min(32, b.threads - index * 32);
  Fibre* lanes = &b.fibres[index * 32];
  Permutation lane_order(size, order);
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (const int i : lane_order.next(random)) {
      if (lanes[i].state != kRuns) continue;
      progress = any = true;
      resume(lanes[i]);
    }
    if (!complete_collectives(b.warps[index], lanes, size)) continue;
    progress = true;
    if constexpr (kCounts) count_step(index);
  }
  return any;
}

// After every warp has run as far as it can: the block's end (true), its barrier, or a mistake.
bool finish_step(Running& b, bool any_ran) {
  int returned = 0;
  const Fibre* first = nullptr;
  for (const Fibre& fibre : b.fibres) {
    if (fibre.state == kReturned) returned++;
    if (fibre.state == kAtCollective) {
      fail("a warp collective that never completes", fibre.where, fibre.rank);
    }
    if (fibre.state != kAtBlockBarrier) continue;
    if (!first) first = &fibre;
    if (!same(first->where, fibre.where)) {
      fail("threads wait at different block barriers", fibre.where, fibre.rank);
    }
  }
  if constexpr (kCounts) {
    for (size_t i = 0; i < b.warps.size(); i++) count_step(static_cast<int>(i));
  }
  if (returned == b.threads) return true;
  if (first && returned) {
    fail("a block barrier after other threads returned", first->where, first->rank);
  }
  if (!first && !any_ran) fail("no thread can go on", {}, 0);
  if (first) {
    b.counts.block_barriers++;
    for (Fibre& fibre : b.fibres) fibre.state = kRuns;
  }
  return false;
}

void map_stacks(Running& b) {
  for (Fibre& fibre : b.fibres) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    fibre.stack = static_cast<char*>(stack);
  }
}

void unmap_stacks(Running& b) {
  for (Fibre& fibre : b.fibres) munmap(fibre.stack, kStackBytes);
}

// Memory that the next block alone uses.
void new_memory(Running& b) {
  // Of the exact size, so that AddressSanitizer sees its end; NaN in every float format.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, b.shared_bytes) != 0) abort();
  memset(shared, 0xFF, b.shared_bytes);
  b.shared = static_cast<unsigned char*>(shared);
  b.shared_blocks.push_back(shared);
  if (b.syncs.empty() || __tsan_acquire) {
    b.syncs.push_back(std::make_unique<Sync>());
    b.syncs.back()->arrived.resize(b.warps.size());
  }
}

void free_shared(Running& b) {
  for (void* shared : b.shared_blocks) free(shared);
  b.shared_blocks.clear();
}

void destroy_tsan_fibres(Running& b) {
  for (void* fibre : b.tsan_fibres) __tsan_destroy_fiber(fibre);
  b.tsan_fibres.clear();
}

void run_block(Running& b, Order order, std::mt19937& random) {
  if (__tsan_get_current_fiber) b.tsan = __tsan_get_current_fiber();
  if constexpr (kCounts) count_block(b.threads);
  new_memory(b);
  for (int i = 0; i < b.threads; i++) begin(b.fibres[i], i, b.size);
  Permutation warp_order(static_cast<int>(b.warps.size()), order);
  for (bool done = false; !done;) {
    bool any = false;
    for (const int warp : warp_order.next(random)) any |= run_warp(b, warp, order, random);
    done = finish_step(b, any);
  }
  b.counts.blocks++;
  if (!__tsan_destroy_fiber) return free_shared(b);
  for (Fibre& fibre : b.fibres) b.tsan_fibres.push_back(fibre.tsan);
  if (b.tsan_fibres.size() > kMostTsanFibres) destroy_tsan_fibres(b);
  unmap_stacks(b);
  map_stacks(b);
}

}  // namespace

void sync_block(Where where) {
  Fibre* fibre = self();
  fibre->state = kAtBlockBarrier;
  fibre->where = where;
  char* parity = &running->syncs.back()->barrier[running->counts.block_barriers & 1];
  release(parity);
  to_scheduler();
  acquire(parity);
}

void sync_warp(unsigned mask, Where where) { wait_at_collective(mask, where); }

Exchanged exchange_bytes(unsigned mask, const Bytes& bytes, Where where) {
  Fibre* fibre = self();
  fibre->brings = bytes;
  wait_at_collective(mask, where);
  return reinterpret_cast<Exchanged>(running->warps[fibre->rank / 32].brought);
}

void start_copy(void* to, const void* from, Where where) {
  Fibre* fibre = self();
  fibre->where = where;
  if (fibre->next_copy - fibre->oldest_copy == kMostCopies) {
    fail("more asynchronous copies in flight than the emulator keeps", where, fibre->rank);
  }
  ring_copy(fibre, fibre->next_copy++) = {to, from, fibre->group};
}

void commit_copies() { self()->group++; }

bool next_complete(int groups_in_flight, Copy& copy) {
  Fibre* fibre = self();
  // Copies that no commit closed belong to the group that is still open, which no wait reaches.
  if (fibre->oldest_copy == fibre->next_copy) return false;
  const Copy& oldest = ring_copy(fibre, fibre->oldest_copy);
  if (oldest.group >= fibre->group - groups_in_flight) return false;
  copy = oldest;
  fibre->oldest_copy++;
  return true;
}

void require_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("an address that is not a multiple of the access's size", where, self()->rank);
  }
}

Counts run(const Launch& launch, const std::function<void()>& body) {
  Running b{};
  b.size = launch.block;
  b.grid = launch.grid;
  b.threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  b.fibres.resize(b.threads);
  b.warps.resize((b.threads + 31) / 32);
  b.shared_bytes = launch.shared_bytes;
  b.body = &body;
  map_stacks(b);
  std::mt19937 random(launch.seed);
  running = &b;
  block = &b;
  const Index& grid = launch.grid;
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; i++) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(b, launch.order, random);
  }
  acquire(&b.end);
  destroy_tsan_fibres(b);
  free_shared(b);
  unmap_stacks(b);
  running = nullptr;
  block = nullptr;
  thread = nullptr;
  return b.counts;
}

}  // namespace emulator
