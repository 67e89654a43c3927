#include "cuda/launcher.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>

namespace evit::cuda {

// ---- launch shapes

bool launch_shape(const std::string& kernel, const std::vector<int>& sizes, int family, i64 B,
                  i64 H, i64 W, LaunchShape* shape, std::string* error) {
  for (const LaunchRow* row = kLaunchRows; row->kernel; row++) {
    if (kernel != row->kernel) continue;
    if (sizes.size() > static_cast<size_t>(row->sizes)) {
      *error = "cuda: " + kernel + " has " + std::to_string(row->sizes) + " sizes, got " +
               std::to_string(sizes.size()) + "; build the native library again";
      return false;
    }
    std::vector<int> all(sizes);
    all.resize(row->sizes);
    *shape = row->shape(all.data(), family, B, H, W);
    return true;
  }
  *error = "cuda: the native library knows no kernel " + kernel + "; build it again";
  return false;
}

// ---- the driver

namespace {

// Names, types and numbers of NVIDIA's driver API: docs.nvidia.com/cuda/cuda-driver-api
using Handle = void*;
constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedBytesOfAnyLaunch = 48 * 1024;  // more must be asked for
constexpr i64 kMaxBlocksX = 0x7fffffff, kMaxBlocksY = 65535;
Handle const kBufferPointer = reinterpret_cast<Handle>(1);  // CU_LAUNCH_PARAM_BUFFER_POINTER
Handle const kBufferSize = reinterpret_cast<Handle>(2);     // CU_LAUNCH_PARAM_BUFFER_SIZE

struct Driver {
  int (*init)(unsigned);
  int (*version)(int*);
  int (*device)(int*, int);
  int (*retain)(Handle*, int);
  int (*current)(Handle*);
  int (*push)(Handle);
  int (*pop)(Handle*);
  int (*load)(Handle*, const void*);
  int (*function)(Handle*, Handle, const char*);
  int (*attribute)(int*, int, Handle);
  int (*set_attribute)(Handle, int, int);
  int (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                Handle, Handle*, Handle*);
  int (*error_name)(int, const char**);
  int (*error_text)(int, const char**);
};

template <typename Function>
bool find(void* library, const char* name, Function* function, std::string* error) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function) return true;
  *error = std::string("cuda: the NVIDIA driver has no ") + name + "; install a newer one";
  return false;
}

const Driver* open(const char* path, std::string* error) {
  void* library = dlopen(path, RTLD_NOW);
  if (!library) {
    *error = std::string("cuda: no NVIDIA driver (") + path + ") could be opened on this machine";
    return nullptr;
  }
  Driver d;
  const bool complete = find(library, "cuInit", &d.init, error) &&
                        find(library, "cuDriverGetVersion", &d.version, error) &&
                        find(library, "cuDeviceGet", &d.device, error) &&
                        find(library, "cuDevicePrimaryCtxRetain", &d.retain, error) &&
                        find(library, "cuCtxGetCurrent", &d.current, error) &&
                        find(library, "cuCtxPushCurrent_v2", &d.push, error) &&
                        find(library, "cuCtxPopCurrent_v2", &d.pop, error) &&
                        find(library, "cuModuleLoadData", &d.load, error) &&
                        find(library, "cuModuleGetFunction", &d.function, error) &&
                        find(library, "cuFuncGetAttribute", &d.attribute, error) &&
                        find(library, "cuFuncSetAttribute", &d.set_attribute, error) &&
                        find(library, "cuLaunchKernel", &d.launch, error) &&
                        find(library, "cuGetErrorName", &d.error_name, error) &&
                        find(library, "cuGetErrorString", &d.error_text, error);
  return complete ? new Driver(d) : nullptr;  // for as long as the process lives
}

std::atomic<const Driver*> g_driver{nullptr};

const Driver* driver(std::string* error) {
  const Driver* known = g_driver.load();
  if (known) return known;
  const Driver* opened = open("libcuda.so.1", error);
  // Two threads may open it at once: the same library, and either table will do.
  if (opened) g_driver.store(opened);
  return opened;
}

std::string reason(const Driver& d, int status) {
  const char *name = nullptr, *text = nullptr;
  d.error_name(status, &name);
  d.error_text(status, &text);
  return std::string(text ? text : "unknown error") + " (" + (name ? name : "") +
         (name ? ", " : "") + std::to_string(status) + ")";
}

bool failed(const Driver& d, int status, const std::string& what, std::string* error) {
  if (status == 0) return false;
  *error = "cuda: " + what + " failed: " + reason(d, status);
  return true;
}

// The context is the thread's current one inside. torch makes it so only where it must.
class Inside {
 public:
  Inside(const Driver& d, uintptr_t context, std::string* error) : d_(d) {
    Handle current = nullptr;
    ok_ = !failed(d, d.current(&current), "asking for the current context", error);
    if (!ok_ || current == reinterpret_cast<Handle>(context)) return;
    ok_ = pushed_ =
        !failed(d, d.push(reinterpret_cast<Handle>(context)), "entering a context", error);
  }
  ~Inside() {
    Handle popped;
    if (pushed_) d_.pop(&popped);
  }
  explicit operator bool() const { return ok_; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  const Driver& d_;
  bool ok_ = false, pushed_ = false;
};

}  // namespace

bool driver_version(const char* path, int* version, std::string* error) {
  if (path) {
    const Driver* other = open(path, error);
    if (!other) return false;
    g_driver.store(other);
  }
  const Driver* d = driver(error);
  return d && !failed(*d, d->version(version), "asking the driver for its version", error);
}

bool primary_context(int device, uintptr_t* context, std::string* error) {
  const Driver* d = driver(error);
  const std::string name = "device " + std::to_string(device);
  int handle = 0;
  Handle found = nullptr;
  if (!d || failed(*d, d->init(0), "starting the NVIDIA driver", error) ||
      failed(*d, d->device(&handle, device), "opening " + name, error) ||
      failed(*d, d->retain(&found, handle), "making a context on " + name, error)) {
    return false;
  }
  *context = reinterpret_cast<uintptr_t>(found);
  return true;
}

bool load_kernel(uintptr_t context, const void* cubin, const std::string& kernel,
                 uintptr_t* function, std::string* error) {
  const Driver* d = driver(error);
  if (!d) return false;
  const Inside inside(*d, context, error);
  Handle module = nullptr, found = nullptr;
  if (!inside || failed(*d, d->load(&module, cubin), "loading " + kernel, error) ||
      failed(*d, d->function(&found, module, kernel.c_str()), "finding " + kernel, error)) {
    return false;
  }
  *function = reinterpret_cast<uintptr_t>(found);
  return true;
}

// ---- launches

bool Launches::add(uintptr_t function, const std::string& kernel, const std::vector<int>& sizes,
                   int family, const std::vector<i64>& words, const std::vector<int>& bases, i64 B,
                   i64 H, i64 W, std::string* error) {
  One one{kernel, function, {}, static_cast<int>(words.size()), {}, {}};
  if (!launch_shape(kernel, sizes, family, B, H, W, &one.shape, error)) return false;
  const LaunchShape& s = one.shape;
  if (words.size() > kMaxWords || words.size() != bases.size()) {
    *error = "cuda: " + kernel + " has " + std::to_string(words.size()) + " arguments and " +
             std::to_string(bases.size()) + " bases, expected as many of both, at most " +
             std::to_string(kMaxWords);
    return false;
  }
  if (s.blocks_x < 1 || s.blocks_x > kMaxBlocksX || s.blocks_y < 1 || s.blocks_y > kMaxBlocksY) {
    *error = "cuda: " + kernel + " would take " + std::to_string(s.blocks_x) + " x " +
             std::to_string(s.blocks_y) + " blocks, a launch has 1 to 2^31 - 1 x 65535; use a " +
             "smaller batch";
    return false;
  }
  for (size_t i = 0; i < words.size(); i++) {
    if (bases[i] < 0 || bases[i] >= kBases) {
      *error = "cuda: " + kernel + " has an argument of base " + std::to_string(bases[i]) +
               ", expected 0 to 3";
      return false;
    }
    one.value[i] = words[i];
    one.base[i] = static_cast<unsigned char>(bases[i]);
  }
  if (s.shared_bytes > kSharedBytesOfAnyLaunch) {
    const Driver* d = driver(error);
    if (!d) return false;
    const Inside inside(*d, context_, error);
    const Handle f = reinterpret_cast<Handle>(function);
    const std::string wish = std::to_string(s.shared_bytes) + " bytes of shared memory for ";
    int allowed = 0;
    if (!inside ||
        failed(*d, d->attribute(&allowed, kMaxDynamicSharedBytes, f),
               "asking for the shared memory of " + kernel, error) ||
        (allowed < s.shared_bytes &&
         failed(*d, d->set_attribute(f, kMaxDynamicSharedBytes, s.shared_bytes), wish + kernel,
                error))) {
      return false;
    }
  }
  launches_.push_back(one);
  return true;
}

bool Launches::run(uintptr_t stream, uintptr_t y, uintptr_t x, uintptr_t space,
                   std::string* error) const {
  const Driver* d = driver(error);
  if (!d) return false;
  const Inside inside(*d, context_, error);
  if (!inside) return false;
  const i64 starts[kBases] = {0, static_cast<i64>(y), static_cast<i64>(x), static_cast<i64>(space)};
  for (const One& one : launches_) {
    i64 words[kMaxWords];
    for (int i = 0; i < one.words; i++) words[i] = one.value[i] + starts[one.base[i]];
    size_t bytes = one.words * sizeof(i64);
    Handle arguments[] = {kBufferPointer, words, kBufferSize, &bytes, nullptr};
    const LaunchShape& s = one.shape;
    const int status =
        d->launch(reinterpret_cast<Handle>(one.function), static_cast<unsigned>(s.blocks_x),
                  static_cast<unsigned>(s.blocks_y), 1, static_cast<unsigned>(s.threads), 1, 1,
                  static_cast<unsigned>(s.shared_bytes), reinterpret_cast<Handle>(stream), nullptr,
                  arguments);
    if (status != 0) {
      return !failed(*d, status,
                     "the launch of " + one.kernel + " (" + std::to_string(s.blocks_x) + " x " +
                         std::to_string(s.blocks_y) + " blocks of " + std::to_string(s.threads) +
                         " threads, " + std::to_string(s.shared_bytes) + " bytes of shared memory)",
                     error);
    }
  }
  return true;
}

}  // namespace evit::cuda
