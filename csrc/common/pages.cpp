#include "common/pages.h"

#include <stdint.h>
#include <sys/mman.h>

namespace evit {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

size_t rounded(size_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

}  // namespace

void* pages_alloc(size_t bytes) {
  if (bytes == 0 || bytes > SIZE_MAX / 2) return nullptr;
  const size_t size = rounded(bytes);
  char* whole = (char*)mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  // Cut to the aligned part: a page that the mapping covers only in part stays small.
  char* memory = whole + (kHuge - (uintptr_t)whole % kHuge) % kHuge;
  if (memory > whole) munmap(whole, memory - whole);
  const size_t tail = whole + size + kHuge - (memory + size);
  if (tail > 0) munmap(memory + size, tail);
  madvise(memory, size, MADV_HUGEPAGE);  // refused: 4 KiB pages, right but slower
  return memory;
}

void pages_free(void* memory, size_t bytes) {
  if (memory) munmap(memory, rounded(bytes));
}

}  // namespace evit
