// The pool and the barrier, without Python: run under a thread and an address sanitizer by
// tests/test_pool.py. Prints "ok" and returns 0, or says what does not hold. Arguments: the checks
// to run, all of them when there are none.
#include "cpu/pool.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "cpu/team.h"

namespace {
thread_local bool t_restless = false;
constexpr long kRanks = 0xffff;  // in the word that a caller sleeps on
}  // namespace

// Stands before the C library's: a restless thread does not sleep while ranks are running.
extern "C" long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long arg[6];
  for (long& a : arg) a = va_arg(list, long);
  va_end(list);
  if (number == SYS_futex && t_restless && arg[1] == FUTEX_WAIT_PRIVATE && (arg[2] & kRanks) != 0) {
    errno = EINTR;
    return -1;
  }
  static const auto next = reinterpret_cast<long (*)(long, ...)>(dlsym(RTLD_NEXT, "syscall"));
  return next(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]);
}

namespace {

constexpr unsigned kDeadlockSeconds = 60;  // then an alarm ends the process: a failure

void require(bool holds, const char* fact) {
  if (holds) return;
  fprintf(stderr, "pool: %s\n", fact);
  _exit(1);
}

struct Counted {
  std::atomic<int> runs[evit::kMaxThreads] = {};
  std::atomic<int> size{0};
};

void count(void* ctx, int rank, int size) {
  auto* c = static_cast<Counted*>(ctx);
  c->runs[rank]++;
  c->size = size;
}

void every_rank_runs_once(int threads) {
  Counted c;
  evit::pool_run(threads, count, &c);
  const int size = c.size;
  require(size >= 1 && size <= (threads < 1 ? 1 : threads), "the size is not within the call's");
  for (int i = 0; i < evit::kMaxThreads; i++) {
    require(c.runs[i] == (i < size ? 1 : 0), "a rank did not run exactly once");
  }
}

void sizes() {
  for (const int threads : {1, 2, 8, 3, 1, 0, -5, 17, 2}) {
    for (int i = 0; i < 50; i++) every_rank_runs_once(threads);
  }
  every_rank_runs_once(evit::kMaxThreads + 100);
  Counted c;
  evit::pool_run(4, count, &c);
  require(c.size == 4, "four threads were asked for and a free pool gave fewer");
}

// Each round, every rank reads what its neighbour wrote in the round before: a plain int, so the
// thread sanitizer sees a missing barrier.
struct Ring {
  evit::SpinBarrier barrier;
  int rounds;
  int cell[2][64] = {};
  std::atomic<bool> wrong{false};
};

void pass_on(void* ctx, int rank, int size) {
  auto* r = static_cast<Ring*>(ctx);
  const evit::Team team{rank, size, &r->barrier};
  for (int round = 0; round < r->rounds; round++) {
    const int seen = r->cell[round % 2][(rank + 1) % size];
    if (seen != round) r->wrong = true;
    r->cell[(round + 1) % 2][rank] = round + 1;
    team.sync();
  }
}

void barrier() {
  for (const int threads : {2, 8, 1}) {  // 8: more than the cores of a small machine
    Ring r;
    r.rounds = 500;
    evit::pool_run(threads, pass_on, &r);
    require(!r.wrong, "a rank passed the barrier before another had written");
  }
}

// A futex may wake without a reason. With a caller that does so every time, some of its ranks end
// between any two of its instructions.
void wakes_for_nothing() {
  t_restless = true;
  for (int i = 0; i < 20'000; i++) {
    Counted c;
    evit::pool_run(8, count, &c);
  }
  t_restless = false;
}

void callers() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++) {
    threads.emplace_back([] {
      for (int i = 0; i < 300; i++) every_rank_runs_once(3);
    });
  }
  for (auto& t : threads) t.join();
}

void nested() {
  Counted c;
  evit::pool_run(3, [](void* ctx, int, int) { evit::pool_run(3, count, ctx); }, &c);
  require(c.runs[0] == 3 && c.runs[1] == 0, "a call from inside a call did not run alone");
}

// Idle workers sleep: with nothing to do the process uses no processor time.
void sleep_when_idle() {
  every_rank_runs_once(2);
  usleep(20'000);
  const clock_t before = clock();
  usleep(200'000);
  require(clock() - before < CLOCKS_PER_SEC / 20, "idle workers do not sleep");
  every_rank_runs_once(2);
}

void after_fork() {
  every_rank_runs_once(3);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kDeadlockSeconds);  // not inherited
    for (int i = 0; i < 20; i++) every_rank_runs_once(3);
    Counted c;
    evit::pool_run(3, count, &c);
    require(c.size == 3, "the child's pool has no threads");
    exit(0);  // runs the destructors, which must find the child's own workers
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(status == 0, "the pool does not work in a forked child");
  every_rank_runs_once(3);
}

// A child that never uses the pool must not wait for its parent's threads when it ends.
void exit_after_fork() {
  every_rank_runs_once(3);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kDeadlockSeconds);
    exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(status == 0, "a forked child does not end");
}

// The process ends while another thread is inside a call: nothing may wait for it, nor crash.
void exit_while_busy() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(kDeadlockSeconds);
    std::thread([] {
      for (;;) every_rank_runs_once(3);
    }).detach();
    usleep(5'000);
    exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(status == 0, "a process does not end while its pool is busy");
}

struct Check {
  const char* name;
  void (*run)();
};
constexpr Check kChecks[] = {
    {"sizes", sizes},
    {"barrier", barrier},
    {"restless", wakes_for_nothing},
    {"callers", callers},
    {"nested", nested},
    {"idle", sleep_when_idle},
    {"fork", after_fork},
    {"exit_after_fork", exit_after_fork},
    {"exit_while_busy", exit_while_busy},
};

}  // namespace

int main(int argc, char** argv) {
  alarm(kDeadlockSeconds);
  for (const Check& check : kChecks) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; i++) wanted |= strcmp(argv[i], check.name) == 0;
    if (wanted) check.run();
  }
  puts("ok");
  return 0;
}
