#include "counts.h"

#include <algorithm>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

enum : int { kShared = -1, kNeither = -2 };

struct Access {
  uint64_t site;  // call path and instruction
  uintptr_t address;
  int turn;  // of its lane at this site
  unsigned short bytes;
  signed char lane;
  bool writes;
  int where;  // a buffer, or kShared
};

struct Buffer {
  uintptr_t begin, end;
  BufferCounts counts;
  std::vector<bool> read, written;  // by sector
};

struct Path {
  uint64_t hash;
  std::vector<uint64_t> callers;  // hashes
};

std::vector<Buffer> buffers;
SharedCounts shared_counts;
std::vector<Path> paths;                // by thread
std::vector<std::vector<Access>> logs;  // by warp
std::vector<uintptr_t> units;           // sectors or words of one instruction

uint64_t mix(uint64_t hash, const void* pc) {
  return (hash ^ reinterpret_cast<uintptr_t>(pc)) * 0x9E3779B97F4A7C15u ^ hash >> 29;
}

int place(uintptr_t address) {
  const auto shared = reinterpret_cast<uintptr_t>(block->shared);
  if (address >= shared && address < shared + block->shared_bytes) return kShared;
  for (size_t i = 0; i < buffers.size(); i++) {
    if (address >= buffers[i].begin && address < buffers[i].end) return static_cast<int>(i);
  }
  return kNeither;
}

long different_units() {
  std::sort(units.begin(), units.end());
  return std::unique(units.begin(), units.end()) - units.begin();
}

void count_global(const Access* first, const Access* last) {
  Buffer& buffer = buffers[first->where];
  units.clear();
  for (const Access* a = first; a != last; a++) {
    const uintptr_t end = (a->address + a->bytes - 1) / kSectorBytes;
    for (uintptr_t sector = a->address / kSectorBytes; sector <= end; sector++) {
      units.push_back(sector);
      (a->writes ? buffer.written : buffer.read)[sector - buffer.begin / kSectorBytes] = true;
    }
  }
  buffer.counts.instructions++;
  buffer.counts.sectors += different_units();
}

// Banks serve one word each at a time; the lanes of a wide access take turns anyway: 16 lanes of 8
// bytes, 8 lanes of 16.
void count_shared(const Access* first, const Access* last) {
  const int lanes_of_turn = first->bytes <= 4 ? 32 : 128 / first->bytes;
  long wavefronts = 0, least = 0;
  for (const Access* begin = first; begin != last;) {
    const int turn = begin->lane / lanes_of_turn;
    units.clear();
    for (; begin != last && begin->lane / lanes_of_turn == turn; begin++) {
      const uintptr_t end = (begin->address + begin->bytes - 1) / kBankBytes;
      for (uintptr_t word = begin->address / kBankBytes; word <= end; word++) units.push_back(word);
    }
    units.resize(static_cast<size_t>(different_units()));
    long words[kBanks] = {};
    for (const uintptr_t word : units) words[word % kBanks]++;
    wavefronts += *std::max_element(words, words + kBanks);
    least++;
  }
  shared_counts.instructions++;
  shared_counts.conflict_free += wavefronts == least;
  shared_counts.wavefronts += wavefronts;
  shared_counts.least_wavefronts += least;
}

}  // namespace

void count_access(const void* address, size_t bytes, bool writes, const void* caller) {
  if (!thread) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const int where = place(at);
  if (where == kNeither) return;
  logs[thread->rank / 32].push_back({mix(paths[thread->rank].hash, caller), at, 0,
                                     static_cast<unsigned short>(bytes),
                                     static_cast<signed char>(lane()), writes, where});
}

void count_block(int threads) {
  paths.assign(threads, {});
  logs.resize((threads + 31) / 32);
}

void count_step(int warp) {
  std::vector<Access>& log = logs[warp];
  // A lane's accesses lie in the order in which it made them.
  std::stable_sort(log.begin(), log.end(), [](const Access& a, const Access& b) {
    return a.site != b.site ? a.site < b.site : a.lane < b.lane;
  });
  for (size_t i = 1; i < log.size(); i++) {
    const bool again = log[i].site == log[i - 1].site && log[i].lane == log[i - 1].lane;
    log[i].turn = again ? log[i - 1].turn + 1 : 0;
  }
  std::sort(log.begin(), log.end(), [](const Access& a, const Access& b) {
    if (a.site != b.site) return a.site < b.site;
    return a.turn != b.turn ? a.turn < b.turn : a.lane < b.lane;
  });
  for (const Access *a = log.data(), *end = a + log.size(); a != end;) {
    const Access* last = std::find_if(a, end, [a](const Access& b) {
      return b.site != a->site || b.turn != a->turn || b.where != a->where;
    });
    a->where == kShared ? count_shared(a, last) : count_global(a, last);
    a = last;
  }
  log.clear();
}

}  // namespace emulator

extern "C" {

void watch(int count, const void* const* addresses, const long* bytes) {
  using namespace emulator;
  buffers.assign(count, {});
  shared_counts = {};
  for (int i = 0; i < count; i++) {
    Buffer& b = buffers[i];
    b.begin = reinterpret_cast<uintptr_t>(addresses[i]);
    b.end = b.begin + static_cast<size_t>(bytes[i]);
    const size_t sectors = b.end / kSectorBytes + 1 - b.begin / kSectorBytes;
    b.read.resize(sectors);
    b.written.resize(sectors);
  }
}

void counts(emulator::BufferCounts* out, emulator::SharedCounts* shared) {
  using namespace emulator;
  for (size_t i = 0; i < buffers.size(); i++) {
    Buffer& b = buffers[i];
    b.counts.distinct_read = std::count(b.read.begin(), b.read.end(), true);
    b.counts.distinct_written = std::count(b.written.begin(), b.written.end(), true);
    out[i] = b.counts;
  }
  *shared = shared_counts;
}

// What g++ -fsanitize=thread calls.
#define SITE __builtin_return_address(0)
#define COUNTED(bytes)                                                                      \
  void __tsan_read##bytes(const void* p) { emulator::count_access(p, bytes, false, SITE); } \
  void __tsan_write##bytes(const void* p) { emulator::count_access(p, bytes, true, SITE); } \
  void __tsan_unaligned_read##bytes(const void* p) {                                        \
    emulator::count_access(p, bytes, false, SITE);                                          \
  }                                                                                         \
  void __tsan_unaligned_write##bytes(const void* p) {                                       \
    emulator::count_access(p, bytes, true, SITE);                                           \
  }
COUNTED(1)
COUNTED(2)
COUNTED(4)
COUNTED(8)
COUNTED(16)
void __tsan_read_range(const void* p, size_t n) { emulator::count_access(p, n, false, SITE); }
void __tsan_write_range(const void* p, size_t n) { emulator::count_access(p, n, true, SITE); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(const void* caller) {
  using namespace emulator;
  if (!thread) return;
  Path& path = paths[thread->rank];
  path.callers.push_back(path.hash);
  path.hash = mix(path.hash, caller);
}
void __tsan_func_exit() {
  using namespace emulator;
  if (!thread) return;
  Path& path = paths[thread->rank];
  if (path.callers.empty()) return;
  path.hash = path.callers.back();
  path.callers.pop_back();
}
}
