// The CUDA sources of csrc/cuda, embedded at build time (cmake/embed.cmake) for NVRTC to compile
// where a GPU is found.
#pragma once

namespace evit {

struct EmbeddedSource {
  const char* name;  // file name, "cga.cuh"
  const char* text;
};

extern const EmbeddedSource kCudaSources[];  // kCudaSourceCount of them, then one of null pointers
extern const int kCudaSourceCount;

}  // namespace evit
