// The CUDA launcher's Python face: addresses of driver objects are ints, failures RuntimeErrors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings_cuda.h"
#include "common/embedded.h"
#include "cuda/launcher.h"

namespace py = pybind11;

namespace {

using evit::cuda::i64;
using evit::cuda::Launches;

void check(bool ok, const std::string& error) {
  if (!ok) throw std::runtime_error(error);
}

py::dict sources() {
  py::dict out;
  for (const evit::EmbeddedSource* s = evit::kCudaSources; s->name; s++) {
    out[py::str(s->name)] = py::str(s->text);
  }
  return out;
}

py::list kernels() {
  py::list out;
  for (const evit::cuda::LaunchRow* row = evit::cuda::kLaunchRows; row->kernel; row++) {
    out.append(row->kernel);
  }
  return out;
}

py::dict launch_shape(const std::string& kernel, const std::vector<int>& sizes, int family, i64 B,
                      i64 H, i64 W) {
  evit::cuda::LaunchShape s;
  std::string error;
  check(evit::cuda::launch_shape(kernel, sizes, family, B, H, W, &s, &error), error);
  return py::dict(py::arg("blocks_x") = s.blocks_x, py::arg("blocks_y") = s.blocks_y,
                  py::arg("threads") = s.threads, py::arg("shared_bytes") = s.shared_bytes,
                  py::arg("blocks_per_sm") = s.blocks_per_sm);
}

int driver(const std::optional<std::string>& path) {
  int version = 0;
  std::string error;
  check(evit::cuda::driver_version(path ? path->c_str() : nullptr, &version, &error), error);
  return version;
}

uintptr_t context(int device) {
  uintptr_t found = 0;
  std::string error;
  check(evit::cuda::primary_context(device, &found, &error), error);
  return found;
}

uintptr_t kernel(uintptr_t context, const py::bytes& cubin, const std::string& name) {
  const std::string code = cubin;
  uintptr_t found = 0;
  std::string error;
  bool ok;
  {
    py::gil_scoped_release release;
    ok = evit::cuda::load_kernel(context, code.data(), name, &found, &error);
  }
  check(ok, error);
  return found;
}

void add(Launches& self, uintptr_t function, const std::string& kernel,
         const std::vector<int>& sizes, int family, const std::vector<i64>& words,
         const std::vector<int>& bases, i64 B, i64 H, i64 W) {
  std::string error;
  check(self.add(function, kernel, sizes, family, words, bases, B, H, W, &error), error);
}

void run(const Launches& self, uintptr_t stream, uintptr_t y, uintptr_t x, uintptr_t space) {
  std::string error;
  bool ok;
  {
    py::gil_scoped_release release;
    ok = self.run(stream, y, x, space, &error);
  }
  check(ok, error);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_sources", &sources, "Name -> text of the CUDA sources.");
  m.def("cuda_kernels", &kernels, "Kernels whose launches are known here.");
  m.def("cuda_launch_shape", &launch_shape, py::arg("kernel"), py::arg("sizes"), py::arg("family"),
        py::arg("B"), py::arg("H"), py::arg("W"), "Grid, threads and shared memory of a launch.");
  m.def("cuda_driver", &driver, py::arg("path") = py::none(),
        "The CUDA version that the driver takes, 12080 for 12.8; path: another library (tests).");
  m.def("cuda_context", &context, py::arg("device"), "The primary context of a device.");
  m.def("cuda_kernel", &kernel, py::arg("context"), py::arg("cubin"), py::arg("name"),
        "Loads a cubin and finds a kernel in it.");
  py::class_<Launches>(m, "CudaLaunches", "A row of launches, prepared once.")
      .def(py::init<uintptr_t>(), py::arg("context"))
      .def("add", &add, py::arg("function"), py::arg("kernel"), py::arg("sizes"), py::arg("family"),
           py::arg("words"), py::arg("bases"), py::arg("B"), py::arg("H"), py::arg("W"),
           "bases: what each word is counted from: 0 nothing, 1 y, 2 x, 3 the workspace.")
      .def("run", &run, py::arg("stream"), py::arg("y"), py::arg("x"), py::arg("space"),
           "All of them in order on a stream.")
      .def("__len__", &Launches::size);
}
