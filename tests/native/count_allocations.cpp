// Counts the allocations of a process that it is preloaded into (LD_PRELOAD): tests/test_memory.py
// asks it. Stands in front of glibc, under whose second names it finds the real functions.
#include <errno.h>
#include <stddef.h>

#include <atomic>

extern "C" {

void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* old, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

}  // extern "C"

namespace {

constexpr size_t kLarge = 64 * 1024;
std::atomic<long> g_all{0}, g_large{0}, g_large_bytes{0};

void count(size_t bytes) {
  g_all++;
  if (bytes <= kLarge) return;
  g_large++;
  g_large_bytes += static_cast<long>(bytes);
}

}  // namespace

extern "C" {

long allocations() { return g_all; }
long large_allocations() { return g_large; }
long large_allocation_bytes() { return g_large_bytes; }

void* malloc(size_t bytes) { return count(bytes), __libc_malloc(bytes); }
void* calloc(size_t n, size_t bytes) { return count(n * bytes), __libc_calloc(n, bytes); }
void* realloc(void* old, size_t bytes) { return count(bytes), __libc_realloc(old, bytes); }
void* memalign(size_t alignment, size_t bytes) {
  return count(bytes), __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

}  // extern "C"
