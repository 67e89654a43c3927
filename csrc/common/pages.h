// Anonymous memory on 2 MiB pages where the system gives them: weights are read once per forward,
// and a model's megabytes take more 4 KiB pages than a TLB holds.
#pragma once

#include <stddef.h>

namespace evit {

// Zeroed memory, aligned to 2 MiB; null when there is none.
void* pages_alloc(size_t bytes);
void pages_free(void* memory, size_t bytes);

}  // namespace evit
