// NVIDIA's driver for tests: the entry points that csrc/cuda/launcher.cpp opens, over host memory.
//
// A module is a shared library that holds one kernel for the emulator (tests/fake_driver.py makes
// it of a "cubin"). As strict as the driver: a context must be current, shared memory above 48 KiB
// must have been asked for, arguments must be as many bytes as the kernel takes. A call fails on
// demand; launches are kept as text; in a capture they are kept and run by the replay.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500 };

struct Module {
  void* context;
  void* library;
};
struct Function {
  void* context;
  std::string name;
  void (*launch)(const void* words, unsigned x, unsigned y, unsigned threads, unsigned shared);
  long args_bytes;
  int shared_bytes;
};
struct Recorded {
  const Function* function;
  std::vector<char> words;
  unsigned x, y, threads, shared;
};

std::recursive_mutex g_lock;
std::map<std::string, int> g_fail;  // by entry point: the status of its next call
std::map<std::string, long> g_calls;
std::string g_launches;
std::vector<std::vector<Recorded>> g_graphs;
const char* (*g_loader)(const char* image);
char g_contexts[8];
thread_local std::vector<void*> t_contexts;
thread_local bool t_capturing = false;

int called(const char* name) {
  const std::lock_guard<std::recursive_mutex> lock(g_lock);
  g_calls[name]++;
  const auto wanted = g_fail.find(name);
  if (wanted == g_fail.end()) return kSuccess;
  const int status = wanted->second;
  g_fail.erase(wanted);
  return status;
}

#define CALLED(name) \
  if (const int status = called(name)) return status

void run(const Recorded& r) { r.function->launch(r.words.data(), r.x, r.y, r.threads, r.shared); }

}  // namespace

extern "C" {

// ---- for the tests

void fake_reset() {
  const std::lock_guard<std::recursive_mutex> lock(g_lock);
  g_fail.clear();
  g_calls.clear();
  g_launches.clear();
  g_graphs.clear();
}
void fake_loader(const char* (*loader)(const char*)) { g_loader = loader; }
void fake_fail(const char* name, int status) { g_fail[name] = status; }
long fake_calls(const char* name) { return g_calls[name]; }
const char* fake_launches() { return g_launches.c_str(); }  // kernel x y threads shared stream
void fake_capture_begin() {
  g_graphs.emplace_back();
  t_capturing = true;
}
int fake_capture_end() {
  t_capturing = false;
  return static_cast<int>(g_graphs.size()) - 1;
}
void fake_replay(int graph) {
  const std::lock_guard<std::recursive_mutex> lock(g_lock);
  for (const Recorded& r : g_graphs[graph]) run(r);
}

// ---- for the launcher

int cuInit(unsigned) { return called("cuInit"); }
int cuDriverGetVersion(int* version) {
  CALLED("cuDriverGetVersion");
  *version = 12080;
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  CALLED("cuDeviceGet");
  *device = ordinal;
  return ordinal < 8 ? kSuccess : kInvalidValue;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  CALLED("cuDevicePrimaryCtxRetain");
  *context = &g_contexts[device];
  return kSuccess;
}
int cuCtxGetCurrent(void** context) {
  CALLED("cuCtxGetCurrent");
  *context = t_contexts.empty() ? nullptr : t_contexts.back();
  return kSuccess;
}
int cuCtxPushCurrent_v2(void* context) {
  CALLED("cuCtxPushCurrent_v2");
  t_contexts.push_back(context);
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
  CALLED("cuCtxPopCurrent_v2");
  if (t_contexts.empty()) return kInvalidContext;
  *context = t_contexts.back();
  t_contexts.pop_back();
  return kSuccess;
}
int cuModuleLoadData(void** module, const void* image) {
  CALLED("cuModuleLoadData");
  if (t_contexts.empty()) return kInvalidContext;
  if (t_capturing) return 900;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
  const char* path = g_loader(static_cast<const char*>(image));
  void* library = path ? dlopen(path, RTLD_NOW) : nullptr;
  *module = new Module{t_contexts.back(), library};
  return library ? kSuccess : kInvalidValue;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  CALLED("cuModuleGetFunction");
  const Module* m = static_cast<Module*>(module);
  const auto kernel = reinterpret_cast<const char* (*)()>(dlsym(m->library, "kernel_name"));
  if (!kernel || std::strcmp(kernel(), name) != 0) return kNotFound;
  auto* f = new Function{m->context, name, nullptr, 0, 48 * 1024};
  f->launch = reinterpret_cast<decltype(f->launch)>(dlsym(m->library, "launch_grid"));
  f->args_bytes = reinterpret_cast<long (*)()>(dlsym(m->library, "args_bytes"))();
  *function = f;
  return kSuccess;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  CALLED("cuFuncGetAttribute");
  if (attribute != 8) return kInvalidValue;
  *value = static_cast<Function*>(function)->shared_bytes;
  return kSuccess;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  CALLED("cuFuncSetAttribute");
  if (attribute != 8 || value > 227 * 1024) return kInvalidValue;
  static_cast<Function*>(function)->shared_bytes = value;
  return kSuccess;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned ty, unsigned tz, unsigned shared, void* stream, void** parameters,
                   void** extra) {
  CALLED("cuLaunchKernel");
  const Function* f = static_cast<Function*>(function);
  if (t_contexts.empty() || t_contexts.back() != f->context) return kInvalidContext;
  const bool counts = x && y && y < 65536 && z == 1 && ty == 1 && tz == 1 && threads <= 1024;
  const bool buffer = !parameters && extra[0] == reinterpret_cast<void*>(1) &&
                      extra[2] == reinterpret_cast<void*>(2) && !extra[4];
  if (!counts || !buffer || shared > static_cast<unsigned>(f->shared_bytes)) return kInvalidValue;
  const size_t bytes = *static_cast<size_t*>(extra[3]);
  if (bytes != static_cast<size_t>(f->args_bytes)) return kInvalidValue;
  const char* words = static_cast<const char*>(extra[1]);
  const Recorded r{f, {words, words + bytes}, x, y, threads, shared};
  const std::lock_guard<std::recursive_mutex> lock(g_lock);
  g_launches += f->name + " " + std::to_string(x) + " " + std::to_string(y) + " " +
                std::to_string(threads) + " " + std::to_string(shared) + " " +
                std::to_string(reinterpret_cast<uintptr_t>(stream)) + "\n";
  if (t_capturing) {
    g_graphs.back().push_back(r);
  } else {
    run(r);
  }
  return kSuccess;
}
int cuGetErrorName(int status, const char** name) {
  *name = status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
  return kSuccess;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 700 ? "an illegal memory access was encountered" : "some error";
  return kSuccess;
}

}  // extern "C"
