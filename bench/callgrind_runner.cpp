// Runs ops one by one under callgrind, each counted alone: reads lines `label B H W bytes program`
// from stdin, all of the weights and images zero (no instruction depends on them). Links the C API.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <valgrind/callgrind.h>

#include "evit_fast.h"

static void* zeros(size_t bytes) {
  const size_t whole = (bytes + 63) / 64 * 64 + 64;
  void* p = aligned_alloc(64, whole);
  memset(p, 0, whole);
  return p;
}

int main() {
  char line[4096], label[128], err[EVIT_ERROR_BYTES];
  while (fgets(line, sizeof line, stdin)) {
    long long B, H, W, bytes;
    int at = 0;
    line[strcspn(line, "\n")] = 0;
    if (sscanf(line, "%127s %lld %lld %lld %lld %n", label, &B, &H, &W, &bytes, &at) < 5) return 2;
    const char* program = line + at;
    void* blob = zeros((size_t)bytes);
    evit_model* model = nullptr;
    if (evit_load_memory(program, blob, (size_t)bytes, &model, err)) {
      fprintf(stderr, "%s: %s\n", label, err);
      return 1;
    }
    const bool stem = strncmp(program, "stem", 4) == 0;
    int channels = 0;
    sscanf(strchr(program, '=') + 1, "%d", &channels);  // the first field: `in` or `C`
    evit_tensor x = {nullptr, EVIT_FLOAT32, 4, {B, H, W, channels}, {}};
    if (stem) x.sizes[1] = channels, x.sizes[2] = H, x.sizes[3] = W;
    evit_tensor y = {nullptr, EVIT_FLOAT32, 0, {}, {}};
    y.rank = evit_output_shape(model, B, H, W, y.sizes);
    int64_t step = 1, n = 1;
    for (int i = 3; i >= 0; i--) x.strides[i] = step, step *= x.sizes[i];
    for (int i = y.rank - 1; i >= 0; i--) y.strides[i] = n, n *= y.sizes[i];
    x.data = zeros((size_t)step * sizeof(float));
    y.data = zeros((size_t)n * sizeof(float));
    const int64_t workspace_bytes = evit_workspace_bytes(model, B, H, W, 1);
    void* workspace = zeros((size_t)workspace_bytes);
    CALLGRIND_ZERO_STATS;
    const int failed = evit_run(model, &x, &y, workspace, (size_t)workspace_bytes, 1, err);
    CALLGRIND_DUMP_STATS_AT(label);
    if (failed) {
      fprintf(stderr, "%s: %s\n", label, err);
      return 1;
    }
    evit_free(model);
    free(blob), free(x.data), free(y.data), free(workspace);
  }
  fprintf(stderr, "%s\n", evit_isa());
  return 0;
}
