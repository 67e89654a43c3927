#include "runtime/threads.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/pool.h"

namespace evit {
namespace {

int limit() {
  const char* text = std::getenv("EVIT_FAST_MAX_THREADS");
  if (!text || !*text) return usable_cpus();
  char* end;
  const long number = std::strtol(text, &end, 10);
  return *end || number < 1 || number > kMaxThreads ? 0 : (int)number;
}

}  // namespace

int running_threads(int threads, std::string* error) {
  static const int most = limit();
  if (most > 0) return threads > kMaxThreads ? threads : std::min(threads, most);
  *error = "EVIT_FAST_MAX_THREADS: expected a number from 1 to 256; correct or unset it";
  return 0;
}

}  // namespace evit
