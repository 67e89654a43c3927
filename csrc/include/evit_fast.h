/* evit_fast: EfficientViT (Microsoft, M0..M5) as a few fused kernels. C API of the CPU column.
 *
 * A model is a program (text, one op per line) and a blob (packed weights); docs/format.md
 * describes both. All functions are thread-safe; a model may be run by several threads at once,
 * each with its own workspace. Nothing allocates in evit_run. Functions that return int return 0,
 * or 1 with one sentence in `err` (may be NULL). */
#ifndef EVIT_FAST_H_
#define EVIT_FAST_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define EVIT_API __attribute__((visibility("default")))
#else
#define EVIT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EVIT_ERROR_BYTES 512

typedef struct evit_model evit_model;

typedef enum { EVIT_FLOAT32 = 0, EVIT_UINT8 = 1 } evit_dtype;

/* Strides are in elements. A program that begins with stem takes x as [B, C, H, W] with any strides
 * (float32: already normalised; uint8: pixels); any other takes contiguous float32 [B, H, W, C]. y
 * is contiguous float32. */
typedef struct {
  void* data;
  evit_dtype dtype;
  int rank;
  int64_t sizes[4];
  int64_t strides[4];
} evit_tensor;

/* Maps a saved file; its checksum is verified. */
EVIT_API int evit_load(const char* path, evit_model** model, char err[EVIT_ERROR_BYTES]);

/* Uses program and blob in place: blob must be 64-byte aligned and outlive the model. */
EVIT_API int evit_load_memory(const char* program, const void* blob, size_t blob_bytes,
                              evit_model** model, char err[EVIT_ERROR_BYTES]);
EVIT_API void evit_free(evit_model* model);

/* Shape of y for B images of H x W pixels (tokens, when the program does not begin with stem).
 * Returns the rank, 2 or 4, or 0 for sizes out of range. */
EVIT_API int evit_output_shape(const evit_model* model, int64_t B, int64_t H, int64_t W,
                               int64_t sizes[4]);

/* Bytes of workspace that evit_run needs, or -1 for sizes out of range. */
EVIT_API int64_t evit_workspace_bytes(const evit_model* model, int64_t B, int64_t H, int64_t W,
                                      int threads);

/* workspace: 64-byte aligned, contents irrelevant. threads: 1..256; results do not depend on it,
 * and no more run than this process may use processors (or the environment variable
 * EVIT_FAST_MAX_THREADS says, read once). */
EVIT_API int evit_run(const evit_model* model, const evit_tensor* x, evit_tensor* y,
                      void* workspace, size_t workspace_bytes, int threads,
                      char err[EVIT_ERROR_BYTES]);

/* The instruction set in use: the highest that the machine has, capped by the environment variable
 * EVIT_FAST_MAX_ISA (read once) or by evit_set_max_isa (NULL: no cap). */
EVIT_API const char* evit_isa(void);
EVIT_API int evit_set_max_isa(const char* name, char err[EVIT_ERROR_BYTES]);

#ifdef __cplusplus
}
#endif

#endif /* EVIT_FAST_H_ */
