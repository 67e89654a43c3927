// Launches of the CUDA column through NVIDIA's driver, which is opened at run time. Knows no op: a
// kernel's grid, threads and shared memory come from the table that the build makes of the
// constexpr functions in csrc/cuda/*.cuh (cmake/launches.cmake).
//
// What fails says so in one sentence (`error`) and returns false. Contexts are torch's: the primary
// one of a device. Nothing here is ever unloaded: a kernel lives as long as the process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace evit::cuda {

// ---- launch shapes

struct LaunchRow {
  const char* kernel;  // cga_attention
  int sizes;           // ints in the op's Sizes
  LaunchShape (*shape)(const int* sizes, int family, i64 B, i64 H, i64 W);
};
extern const LaunchRow kLaunchRows[];
extern const int kLaunchRowCount;

// sizes: the first fields of the op's Sizes, the others are 0.
bool launch_shape(const std::string& kernel, const std::vector<int>& sizes, int family, i64 B,
                  i64 H, i64 W, LaunchShape* shape, std::string* error);

// ---- the driver

// The CUDA version that the driver takes, 12080 for 12.8. `path` opens another library in its place
// (tests).
bool driver_version(const char* path, int* version, std::string* error);

bool primary_context(int device, uintptr_t* context, std::string* error);

// Loads a cubin and finds the kernel in it.
bool load_kernel(uintptr_t context, const void* cubin, const std::string& kernel,
                 uintptr_t* function, std::string* error);

// ---- launches

enum Base { kConstant, kY, kX, kSpace, kBases };  // what a word of arguments is counted from
constexpr int kMaxWords = 64;

// A row of launches whose tensors may lie elsewhere at every run: prepared once, read by any
// thread.
class Launches {
 public:
  explicit Launches(uintptr_t context) : context_(context) {}

  // words: the fields of the kernel's Args; a word that is an address in y, x or the workspace is
  // its distance from the first byte there.
  bool add(uintptr_t function, const std::string& kernel, const std::vector<int>& sizes, int family,
           const std::vector<i64>& words, const std::vector<int>& bases, i64 B, i64 H, i64 W,
           std::string* error);

  // All of them in order on the stream. Allocates nothing, waits for nothing.
  bool run(uintptr_t stream, uintptr_t y, uintptr_t x, uintptr_t space, std::string* error) const;

  size_t size() const { return launches_.size(); }

 private:
  struct One {
    std::string kernel;
    uintptr_t function;
    LaunchShape shape;
    int words;
    i64 value[kMaxWords];
    unsigned char base[kMaxWords];
  };
  uintptr_t context_;
  std::vector<One> launches_;
};

}  // namespace evit::cuda
