// The C API: checks at the border, then the runtime.
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#include "evit_fast.h"
#include "runtime/dispatch.h"
#include "runtime/model.h"
#include "runtime/threads.h"

namespace {

int fail(char* err, const std::string& message) {
  if (err) std::snprintf(err, EVIT_ERROR_BYTES, "%s", message.c_str());
  return 1;
}

std::string shape(const evit_tensor& t) {
  std::string s = "[";
  for (int i = 0; i < t.rank && i < 4; i++) s += (i ? ", " : "") + std::to_string(t.sizes[i]);
  return s + "]";
}

bool contiguous(const evit_tensor& t) {
  int64_t expected = 1;
  for (int i = t.rank - 1; i >= 0; i--) {
    if (t.sizes[i] > 1 && t.strides[i] != expected) return false;
    expected *= t.sizes[i];
  }
  return true;
}

int64_t elements(const evit_tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.rank; i++) n *= t.sizes[i];
  return n;
}

// One sentence, or nothing when x suits the program.
std::string check_input(const evit::Model& m, const evit_tensor& x) {
  const bool stem = m.starts_with_stem();
  if (x.rank != 4) return "x: expected 4 dimensions, got " + std::to_string(x.rank);
  const int64_t channels = x.sizes[stem ? 1 : 3];
  if (channels != m.input_channels()) {
    return "x: shape " + shape(x) + " has " + std::to_string(channels) +
           " channels, the program takes " + std::to_string(m.input_channels()) +
           (stem ? " (layout [B, C, H, W])" : " (layout [B, H, W, C])");
  }
  if (x.dtype != EVIT_FLOAT32 && !(stem && x.dtype == EVIT_UINT8))
    return stem ? "x: expected float32 or uint8" : "x: expected float32";
  if (!stem && !contiguous(x)) return "x: expected contiguous [B, H, W, C]";
  return "";
}

template <class Body>
int guarded(char* err, Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(err, "out of memory");
  } catch (const std::exception& e) {
    return fail(err, e.what());
  }
}

}  // namespace

int evit::timed_run(const evit_model* model, const evit_tensor* x, evit_tensor* y, void* workspace,
                    size_t workspace_bytes, int threads, double* op_seconds, double* stage_seconds,
                    char* err) {
  return guarded(err, [&] {
    const evit::Model& m = model->model;
    std::string error = check_input(m, *x);
    if (!error.empty()) return fail(err, error);
    const evit::cpu::Kernels* k = evit::kernels(&error);
    if (!k) return fail(err, error);
    const int64_t B = x->sizes[0], H = x->sizes[m.starts_with_stem() ? 2 : 1],
                  W = x->sizes[m.starts_with_stem() ? 3 : 2];
    if (stage_seconds && threads != 1)
      return fail(err, "stage times need one thread, got " + std::to_string(threads));
    const int running = evit::running_threads(threads, &error);
    if (!error.empty()) return fail(err, error);
    evit::Plan plan;
    if (!evit::make_plan(m, *k, B, H, W, running, &plan)) {
      return fail(
          err, "x: shape " + shape(*x) + " with " + std::to_string(threads) +
                   " threads is out of range; expected sides from 1 to 16384 and 1 to 256 threads");
    }
    evit_tensor want{nullptr, EVIT_FLOAT32, 0, {}, {}};
    want.rank = evit_output_shape(model, B, H, W, want.sizes);
    bool same = y->rank == want.rank && y->dtype == EVIT_FLOAT32 && contiguous(*y);
    for (int i = 0; same && i < want.rank; i++) same = y->sizes[i] == want.sizes[i];
    if (!same)
      return fail(err, "y: expected contiguous float32 " + shape(want) + ", got " + shape(*y));
    if (workspace_bytes < plan.bytes() || (uintptr_t)workspace % 64) {
      return fail(err, "workspace: expected " + std::to_string(plan.bytes()) +
                           " bytes aligned to 64, got " + std::to_string(workspace_bytes));
    }
    if (elements(*x) == 0) return 0;
    if (op_seconds && plan.teams > 1)
      return fail(err, "op times need one thread, or fewer images than threads");
    if (stage_seconds) k = evit::stage_kernels(k);
    evit::run_plan(m, *k, plan, *x, (float*)y->data, (float*)workspace, op_seconds, stage_seconds);
    return 0;
  });
}

extern "C" {

int evit_load(const char* path, evit_model** model, char* err) {
  return guarded(err, [&] {
    auto m = std::make_unique<evit_model>();
    char message[EVIT_ERROR_BYTES];
    if (!evit::file_open(path, &m->file, message, sizeof message)) return fail(err, message);
    m->mapped = true;
    std::string error;
    const char* program = m->file.find("program");
    if (!program)
      error = "the file has no program";
    else
      evit::model_bind(program, m->file.blob, m->file.blob_bytes, &m->model, &error);
    if (!error.empty()) {
      evit::file_close(&m->file);
      return fail(err, std::string(path) + ": " + error);
    }
    *model = m.release();
    return 0;
  });
}

int evit_load_memory(const char* program, const void* blob, size_t blob_bytes, evit_model** model,
                     char* err) {
  return guarded(err, [&] {
    auto m = std::make_unique<evit_model>();
    std::string error;
    if (!evit::model_bind(program, blob, blob_bytes, &m->model, &error)) return fail(err, error);
    *model = m.release();
    return 0;
  });
}

void evit_free(evit_model* model) {
  if (!model) return;
  if (model->mapped) evit::file_close(&model->file);
  delete model;
}

int evit_output_shape(const evit_model* model, int64_t B, int64_t H, int64_t W, int64_t sizes[4]) {
  if (B < 0 || H < 1 || W < 1 || H > evit::kMaxSide || W > evit::kMaxSide) return 0;
  evit::MapSize s{(int)H, (int)W, model->model.input_channels()};
  for (const evit::BoundOp& b : model->model.ops) s = evit::op_output(b.op, s);
  sizes[0] = B;
  if (model->model.pooled()) {
    sizes[1] = s.C;
    return 2;
  }
  sizes[1] = s.H, sizes[2] = s.W, sizes[3] = s.C;
  return 4;
}

int64_t evit_workspace_bytes(const evit_model* model, int64_t B, int64_t H, int64_t W,
                             int threads) {
  std::string error;
  const evit::cpu::Kernels* k = evit::kernels(&error);
  const int running = evit::running_threads(threads, &error);
  evit::Plan plan;
  if (!k || !evit::make_plan(model->model, *k, B, H, W, running, &plan)) return -1;
  return (int64_t)plan.bytes();
}

int evit_run(const evit_model* model, const evit_tensor* x, evit_tensor* y, void* workspace,
             size_t workspace_bytes, int threads, char* err) {
  return evit::timed_run(model, x, y, workspace, workspace_bytes, threads, nullptr, nullptr, err);
}

const char* evit_isa(void) {
  std::string error;
  const evit::cpu::Kernels* k = evit::kernels(&error);
  return k ? k->name : "";
}

int evit_set_max_isa(const char* name, char* err) {
  return guarded(err, [&] {
    std::string error;
    return evit::set_max_isa(name, &error) ? 0 : fail(err, error);
  });
}

}  // extern "C"
