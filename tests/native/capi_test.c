/* The C API from C: loads a saved model, classifies an image, writes the logits; run by
 * tests/test_capi.py. Arguments: saved model, input (float32 [B, 3, H, W], native order), B, H, W,
 * threads, output. */
#include <evit_fast.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The linker sends every allocation of the program and the library here (--wrap). */
static long allocations;
#define COUNTED(name)            \
  void* __real_##name(size_t n); \
  void* __wrap_##name(size_t n) { return allocations++, __real_##name(n); }
COUNTED(malloc)
COUNTED(_Znwm) /* operator new */
COUNTED(_Znam) /* operator new[] */

static void* aligned(size_t bytes) {
  void* p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (p == NULL) exit(3);
  memset(p, 0xFF, (bytes + 63) / 64 * 64); /* NaN */
  return p;
}

static int fail(const char* what, const char* err) {
  fprintf(stderr, "%s: %s\n", what, err);
  return 1;
}

int main(int argc, char** argv) {
  char err[EVIT_ERROR_BYTES] = "";
  evit_model* model = NULL;
  if (argc != 8) return fail("usage", "model input B H W threads output");
  if (evit_load(argv[1], &model, err)) return fail("evit_load", err);
  const int64_t B = atoi(argv[3]), H = atoi(argv[4]), W = atoi(argv[5]);
  const int threads = atoi(argv[6]);

  evit_tensor x = {NULL, EVIT_FLOAT32, 4, {B, 3, H, W}, {3 * H * W, H * W, W, 1}};
  const size_t n = (size_t)(B * 3 * H * W);
  x.data = aligned(n * sizeof(float));
  FILE* in = fopen(argv[2], "rb");
  if (in == NULL || fread(x.data, sizeof(float), n, in) != n) return fail("input", "too short");
  fclose(in);

  evit_tensor y = {NULL, EVIT_FLOAT32, 0, {0}, {0}};
  y.rank = evit_output_shape(model, B, H, W, y.sizes);
  size_t floats = y.rank > 0;
  for (int i = 0; i < y.rank; i++) floats *= (size_t)y.sizes[i];
  for (int i = y.rank - 1; i >= 0; i--) {
    y.strides[i] = i + 1 < y.rank ? y.strides[i + 1] * y.sizes[i + 1] : 1;
  }
  y.data = aligned(floats * sizeof(float));
  const int64_t bytes = evit_workspace_bytes(model, B, H, W, threads);
  if (bytes < 0) return fail("evit_workspace_bytes", "out of range");
  void* workspace = aligned((size_t)bytes);

  const long before = allocations;
  if (evit_run(model, &x, &y, workspace, (size_t)bytes, threads, err)) return fail("evit_run", err);
  if (allocations != before) return fail("evit_run", "it allocates memory");
  if (!evit_run(model, &x, &y, workspace, (size_t)bytes - 64, threads, err)) {
    return fail("evit_run", "it accepts too small a workspace");
  }

  FILE* out = fopen(argv[7], "wb");
  if (out == NULL || fwrite(y.data, sizeof(float), floats, out) != floats)
    return fail("output", "");
  fclose(out);
  printf("%s\n", evit_isa());
  evit_free(model);
  free(x.data);
  free(y.data);
  free(workspace);
  return 0;
}
