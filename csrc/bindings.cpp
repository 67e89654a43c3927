// The Python face of the native library: the C API, the grammar, packing and saved files. Knows no
// torch: tensors arrive as addresses, sizes and strides.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings_cuda.h"
#include "common/container.h"
#include "common/crc32.h"
#include "common/grammar.h"
#include "common/layout.h"
#include "common/pages.h"
#include "evit_fast.h"
#include "runtime/ceilings.h"
#include "runtime/dispatch.h"
#include "runtime/model.h"
#include "runtime/threads.h"

namespace py = pybind11;

namespace {

[[noreturn]] void value_error(const std::string& message) { throw py::value_error(message); }

evit::Op parse(const std::string& line) {
  evit::Op op;
  std::string error;
  if (!evit::parse_line(line, &op, &error)) value_error(error);
  return op;
}

py::dict grammar() {
  py::dict out;
  for (const evit::OpGrammar& g : evit::grammar()) {
    py::list fields;
    for (const evit::Field& f : g.fields) {
      fields.append(py::dict(py::arg("name") = f.name, py::arg("lo") = f.lo, py::arg("hi") = f.hi,
                             py::arg("multiple") = f.multiple,
                             py::arg("list") = f.value == nullptr));
    }
    out[g.name] = fields;
  }
  return out;
}

py::list layout(const std::string& line) {
  py::list out;
  for (const evit::Section& s : evit::op_sections(parse(line))) {
    out.append(py::dict(py::arg("name") = s.name, py::arg("kind") = evit::section_kind_name(s.kind),
                        py::arg("dims") = py::tuple(py::cast(s.dims)),
                        py::arg("dtype") = evit::dtype_name(s.dtype), py::arg("offset") = s.offset,
                        py::arg("bytes") = s.bytes()));
  }
  return out;
}

std::string dims_text(const std::vector<py::ssize_t>& dims) {
  std::string s = "(";
  for (size_t i = 0; i < dims.size(); i++) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + (dims.size() == 1 ? ",)" : ")");
}

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

void pack(const std::string& line, const py::dict& arrays, const py::buffer& out) {
  const evit::Op op = parse(line);
  const std::vector<evit::Section> sections = evit::op_sections(op);
  const py::buffer_info info = out.request(true);
  const int64_t size = info.size * info.itemsize;
  if (op.at + evit::op_bytes(op) > size) {
    value_error("pack: the op needs bytes up to " + std::to_string(op.at + evit::op_bytes(op)) +
                ", the blob has " + std::to_string(size));
  }
  for (const evit::Section& s : sections) {
    const py::str name(s.name);
    if (!arrays.contains(name))
      value_error("pack: " + line + ": array '" + s.name + "' is missing");
    const Array a = py::cast<Array>(arrays[name]);
    const std::vector<py::ssize_t> want(s.dims.begin(), s.dims.end());
    const std::vector<py::ssize_t> got(a.shape(), a.shape() + a.ndim());
    if (got != want) {
      value_error("pack: array '" + s.name + "' has shape " + dims_text(got) + ", expected " +
                  dims_text(want));
    }
    evit::pack_section(s, a.data(), (char*)info.ptr + op.at + s.offset);
  }
  if (arrays.size() != sections.size()) {
    for (const auto& item : arrays) {
      bool known = false;
      for (const evit::Section& s : sections) known = known || py::str(s.name).equal(item.first);
      if (!known)
        value_error("pack: " + line + ": unexpected array '" +
                    py::str(item.first).cast<std::string>() + "'");
    }
  }
}

void verify(const std::string& program, int64_t blob_bytes) {
  std::vector<evit::Op> ops;
  std::string error;
  if (!evit::parse_program(program, blob_bytes, &ops, &error)) value_error(error);
}

std::string isa_in_use() {
  std::string error;
  const evit::cpu::Kernels* k = evit::kernels(&error);
  if (!k) throw std::runtime_error(error);
  return k->name;
}

// A view of a program and a blob that the caller keeps alive.
class Model {
 public:
  Model(const std::string& program, uintptr_t blob, size_t bytes) {
    char err[EVIT_ERROR_BYTES];
    if (evit_load_memory(program.c_str(), (const void*)blob, bytes, &model_, err)) value_error(err);
  }
  ~Model() { evit_free(model_); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  int64_t workspace_bytes(int64_t B, int64_t H, int64_t W, int threads) const {
    isa_in_use();  // raises when EVIT_FAST_MAX_ISA holds an unknown name
    std::string error;
    if (!evit::running_threads(threads, &error) && !error.empty()) throw std::runtime_error(error);
    const int64_t bytes = evit_workspace_bytes(model_, B, H, W, threads);
    if (bytes < 0) {
      value_error("sizes out of range: B=" + std::to_string(B) + " H=" + std::to_string(H) +
                  " W=" + std::to_string(W) + " threads=" + std::to_string(threads) +
                  "; expected sides from 1 to 16384 and 1 to 256 threads");
    }
    return bytes;
  }
  py::tuple output_shape(int64_t B, int64_t H, int64_t W) const {
    int64_t sizes[4];
    const int rank = evit_output_shape(model_, B, H, W, sizes);
    if (rank == 0) value_error("sizes out of range: expected sides from 1 to 16384");
    py::tuple out(rank);
    for (int i = 0; i < rank; i++) out[i] = sizes[i];
    return out;
  }
  void run(uintptr_t x, const std::string& dtype, const std::vector<int64_t>& sizes,
           const std::vector<int64_t>& strides, uintptr_t y, uintptr_t workspace,
           size_t workspace_bytes, int threads, double* op_seconds = nullptr,
           double* stage_seconds = nullptr) const {
    if (sizes.size() != 4 || strides.size() != 4) value_error("x: expected 4 dimensions");
    if (dtype != "float32" && dtype != "uint8")
      value_error("x: expected float32 or uint8, got " + dtype);
    evit_tensor in{(void*)x, dtype == "uint8" ? EVIT_UINT8 : EVIT_FLOAT32, 4, {}, {}};
    std::copy(sizes.begin(), sizes.end(), in.sizes);
    std::copy(strides.begin(), strides.end(), in.strides);
    evit_tensor out{(void*)y, EVIT_FLOAT32, 0, {}, {}};
    const bool nchw = model_->model.starts_with_stem();
    out.rank =
        evit_output_shape(model_, sizes[0], sizes[nchw ? 2 : 1], sizes[nchw ? 3 : 2], out.sizes);
    int64_t stride = 1;
    for (int i = out.rank - 1; i >= 0; i--) out.strides[i] = stride, stride *= out.sizes[i];
    char err[EVIT_ERROR_BYTES];
    int failed;
    {
      py::gil_scoped_release release;
      failed = evit::timed_run(model_, &in, &out, (void*)workspace, workspace_bytes, threads,
                               op_seconds, stage_seconds, err);
    }
    if (failed) value_error(err);
  }
  std::vector<double> op_times(uintptr_t x, const std::string& dtype,
                               const std::vector<int64_t>& sizes,
                               const std::vector<int64_t>& strides, uintptr_t y,
                               uintptr_t workspace, size_t workspace_bytes, int threads) const {
    std::vector<double> seconds(model_->model.ops.size());
    run(x, dtype, sizes, strides, y, workspace, workspace_bytes, threads, seconds.data());
    return seconds;
  }
  py::list stage_times(uintptr_t x, const std::string& dtype, const std::vector<int64_t>& sizes,
                       const std::vector<int64_t>& strides, uintptr_t y, uintptr_t workspace,
                       size_t workspace_bytes, int threads) const {
    const std::vector<evit::BoundOp>& ops = model_->model.ops;
    std::vector<double> seconds(ops.size() * evit::cpu::kStageCount);
    run(x, dtype, sizes, strides, y, workspace, workspace_bytes, threads, nullptr, seconds.data());
    py::list out;
    for (size_t i = 0; i < ops.size(); i++) {
      py::list stages;
      for (const evit::cpu::Stage s : evit::op_stages(ops[i].op.kind)) {
        stages.append(py::make_tuple(evit::cpu::stage_name(s),
                                     seconds[i * evit::cpu::kStageCount + (size_t)s]));
      }
      out.append(stages);
    }
    return out;
  }

 private:
  evit_model* model_ = nullptr;
};

void set_max_isa(const std::optional<std::string>& name) {
  std::string error;
  if (!evit::set_max_isa(name ? name->c_str() : nullptr, &error)) value_error(error);
}

py::list describe(const std::string& program) {
  std::vector<evit::Op> ops;
  std::string error;
  if (!evit::parse_program(program, -1, &ops, &error)) value_error(error);
  py::list out;
  for (const evit::Op& op : ops) {
    const char* name = evit::grammar()[(int)op.kind].name;
    const bool runs = op.dtype == evit::DType::kFloat32;
    out.append(
        py::dict(py::arg("op") = name, py::arg("kernel") = std::string("csrc/cpu/") + name + ".cpp",
                 py::arg("isa") = isa_in_use(), py::arg("dtype") = evit::dtype_name(op.dtype),
                 py::arg("supported") = runs));
  }
  return out;
}

py::dict stages() {
  py::dict out;
  for (const evit::OpGrammar& g : evit::grammar()) {
    py::list names;
    for (const evit::cpu::Stage s : evit::op_stages(g.kind)) names.append(evit::cpu::stage_name(s));
    out[g.name] = names;
  }
  return out;
}

// A mapped file; its buffer is the blob, private to this process.
class File {
 public:
  explicit File(const std::string& path) {
    char err[EVIT_ERROR_BYTES];
    bool ok;
    {
      py::gil_scoped_release release;
      ok = evit::file_open(path.c_str(), &file_, err, sizeof err);
    }
    if (!ok) value_error(err);
  }
  ~File() { evit::file_close(&file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  py::dict metadata() const {
    py::dict out;
    for (const evit::MetadataEntry& e : file_.metadata) out[py::str(e.key)] = py::str(e.value);
    return out;
  }
  py::buffer_info buffer() { return py::buffer_info(file_.blob, (py::ssize_t)file_.blob_bytes); }

 private:
  evit::EvitFile file_{};
};

// Zeroed bytes on 2 MiB pages, freed with the object.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes), memory_(evit::pages_alloc(bytes)) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Pages() { evit::pages_free(memory_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  py::buffer_info buffer() { return py::buffer_info((unsigned char*)memory_, (py::ssize_t)bytes_); }

 private:
  size_t bytes_;
  void* memory_;
};

uint32_t crc32(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = data.request();
  const size_t bytes = (size_t)(info.size * info.itemsize);
  py::gil_scoped_release release;
  return evit::crc32(seed, info.ptr, bytes);
}

py::tuple ceiling(const std::string& loop, const std::string& isa, int64_t steps, uintptr_t buffer,
                  size_t bytes) {
  evit::CeilingTime time;
  std::string error;
  bool ok;
  {
    py::gil_scoped_release release;
    ok = evit::time_ceiling(loop, isa, steps, (void*)buffer, bytes, &time, &error);
  }
  if (!ok) value_error(error);
  return py::make_tuple(time.seconds, time.amount, time.ops);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native library of evit_fast: programs, packed weights, the CPU column, CUDA launches.";
  m.def("grammar", &grammar, "Fields and legal ranges of every op, in canonical order.");
  m.def("layout", &layout, py::arg("line"),
        "Sections of an op: name, kind, natural dims, dtype, offset, bytes.");
  m.def(
      "op_bytes", [](const std::string& line) { return evit::op_bytes(parse(line)); },
      py::arg("line"), "Bytes of an op's sections in the blob; a multiple of 64.");
  m.def("pack", &pack, py::arg("line"), py::arg("arrays"), py::arg("out"),
        "Writes an op's natural float64 arrays into the blob `out` at the line's `at`.");
  m.def("verify", &verify, py::arg("program"), py::arg("blob_bytes"),
        "ValueError unless the program is legal and stays inside a blob of that size.");
  m.def("isa", &isa_in_use, "The instruction set in use.");
  m.def("isas", &evit::available_isas, "Instruction sets that this machine runs, lowest first.");
  m.def("set_max_isa", &set_max_isa, py::arg("name") = py::none(),
        "Caps the instruction set; None lifts the cap.");
  m.def("describe", &describe, py::arg("program"), "What runs each line on this CPU.");
  m.def("stages", &stages, "The stages of each op in the order of its work, as in stage_times.");
  m.def("ceiling", &ceiling, py::arg("loop"), py::arg("isa"), py::arg("steps"),
        py::arg("buffer") = 0, py::arg("nbytes") = 0,
        "Times clock, fma, read or copy: (seconds; cycles, FLOPs or bytes; vector multiply-adds).");
  m.def("crc32", &crc32, py::arg("data"), py::arg("seed") = 0, "CRC-32 with zlib's polynomial.");
  py::class_<Model>(m, "Model")
      .def(py::init<const std::string&, uintptr_t, size_t>(), py::arg("program"), py::arg("ptr"),
           py::arg("nbytes"))
      .def("workspace_bytes", &Model::workspace_bytes, py::arg("B"), py::arg("H"), py::arg("W"),
           py::arg("threads"))
      .def("output_shape", &Model::output_shape, py::arg("B"), py::arg("H"), py::arg("W"))
      .def(
          "run",
          [](const Model& self, uintptr_t x, const std::string& dtype,
             const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, uintptr_t y,
             uintptr_t workspace, size_t workspace_bytes, int threads) {
            self.run(x, dtype, sizes, strides, y, workspace, workspace_bytes, threads);
          },
          py::arg("x"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("y"),
          py::arg("workspace"), py::arg("workspace_bytes"), py::arg("threads"))
      .def("op_times", &Model::op_times, py::arg("x"), py::arg("dtype"), py::arg("sizes"),
           py::arg("strides"), py::arg("y"), py::arg("workspace"), py::arg("workspace_bytes"),
           py::arg("threads"), "run, and the seconds that every op took (all images together).")
      .def("stage_times", &Model::stage_times, py::arg("x"), py::arg("dtype"), py::arg("sizes"),
           py::arg("strides"), py::arg("y"), py::arg("workspace"), py::arg("workspace_bytes"),
           py::arg("threads"),
           "run on one thread, and for every op (stage, seconds) of each of its stages.");
  py::class_<File>(m, "File", py::buffer_protocol())
      .def_property_readonly("metadata", &File::metadata)
      .def_buffer(&File::buffer);
  py::class_<Pages>(m, "Pages", py::buffer_protocol(),
                    "Zeroed bytes on 2 MiB pages where the system gives them.")
      .def(py::init<size_t>(), py::arg("nbytes"))
      .def_buffer(&Pages::buffer);
  m.def(
      "read_file", [](const std::string& path) { return std::make_unique<File>(path); },
      py::arg("path"), "Maps a saved model; ValueError names what is wrong with it.");
  bind_cuda(m);
}
