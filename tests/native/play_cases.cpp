// Plays cases through the C API, on this machine or another one: tests/test_aarch64.py writes them
// with the float64 results to expect. Arguments: folders, each with the files
//   case     numbers in text: float32 or uint8 (0, 1), B and three more sizes of x, the bound on
//            the relative error
//   program, blob, x (contiguous), y (float64)      or model.evit in the place of program and blob
// Every instruction set that the machine has runs alone and in a team, on poisoned memory between
// canaries. Prints a line per folder, then "ok"; or says what does not hold and returns 1. With
// count_allocations.cpp preloaded it also requires that a repeated run allocates nothing, and ends
// with "ok, no allocations".
#include <evit_fast.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

extern "C" __attribute__((weak)) long allocations();

namespace {

constexpr float kCanary = 123456.0f;
constexpr size_t kEdge = 64;  // floats on either side of a buffer
constexpr int kTeams[] = {2, 3, 8};

struct Case {
  std::string folder;
  evit_model* model;
  evit_tensor x;
  std::vector<double> want;
  double bound;
};

[[noreturn]] void fail(const std::string& what, const std::string& fact) {
  fprintf(stderr, "%s: %s\n", what.c_str(), fact.c_str());
  exit(1);
}

void* aligned(size_t bytes) {
  void* p = aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (p == nullptr) fail("memory", "there is too little");
  return p;
}

// The bytes of a file in memory of their own, aligned to 64 and followed by a zero; null when there
// is none.
char* read(const std::string& path, size_t* bytes) {
  FILE* file = fopen(path.c_str(), "rb");
  if (file == nullptr) return nullptr;
  fseek(file, 0, SEEK_END);
  *bytes = static_cast<size_t>(ftell(file));
  rewind(file);
  char* data = static_cast<char*>(aligned(*bytes));
  if (fread(data, 1, *bytes, file) != *bytes) fail(path, "cannot be read");
  data[*bytes] = '\0';
  fclose(file);
  return data;
}

Case read_case(const std::string& folder) {
  Case c{folder, nullptr, {}, {}, 0};
  size_t bytes = 0, blob_bytes = 0;
  int dtype = 0;
  long long n[4];
  char err[EVIT_ERROR_BYTES] = "";

  const char* text = read(folder + "/case", &bytes);
  if (text == nullptr || sscanf(text, "%d %lld %lld %lld %lld %lf", &dtype, &n[0], &n[1], &n[2],
                                &n[3], &c.bound) != 6) {
    fail(folder, "has no case");
  }
  const char* program = read(folder + "/program", &bytes);
  const char* blob = read(folder + "/blob", &blob_bytes);
  const int failed = program == nullptr
                         ? evit_load((folder + "/model.evit").c_str(), &c.model, err)
                         : evit_load_memory(program, blob, blob_bytes, &c.model, err);
  if (failed) fail(folder, err);

  c.x.data = read(folder + "/x", &bytes);
  c.x.dtype = dtype == 0 ? EVIT_FLOAT32 : EVIT_UINT8;
  c.x.rank = 4;
  int64_t stride = 1;
  for (int i = 3; i >= 0; i--) c.x.sizes[i] = n[i], c.x.strides[i] = stride, stride *= n[i];
  if (bytes != static_cast<size_t>(stride) * (dtype == 0 ? 4 : 1)) fail(folder, "x is too short");

  const char* y = read(folder + "/y", &bytes);
  c.want.resize(bytes / sizeof(double));
  memcpy(c.want.data(), y, bytes);
  return c;
}

// Floats that start as NaN, with canaries on both sides.
struct Guarded {
  explicit Guarded(size_t n)
      : n(n), whole(static_cast<float*>(aligned((n + 2 * kEdge) * sizeof(float)))) {
    for (size_t i = 0; i < n + 2 * kEdge; i++) {
      whole[i] = i >= kEdge && i < kEdge + n ? NAN : kCanary;
    }
  }
  ~Guarded() { free(whole); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  float* data() const { return whole + kEdge; }
  bool intact() const {
    for (size_t i = 0; i < kEdge; i++) {
      if (whole[i] != kCanary || whole[kEdge + n + i] != kCanary) return false;
    }
    return true;
  }

  const size_t n;
  float* const whole;
};

std::vector<float> run(const Case& c, bool nchw, int threads) {
  const std::string what = c.folder + " with " + std::to_string(threads) + " threads";
  const int64_t B = c.x.sizes[0], H = c.x.sizes[nchw ? 2 : 1], W = c.x.sizes[nchw ? 3 : 2];
  evit_tensor y{nullptr, EVIT_FLOAT32, 0, {}, {}};
  y.rank = evit_output_shape(c.model, B, H, W, y.sizes);
  int64_t n = 1;
  for (int i = y.rank - 1; i >= 0; i--) y.strides[i] = n, n *= y.sizes[i];
  if (n != static_cast<int64_t>(c.want.size())) fail(what, "the output has another size");

  const int64_t bytes = evit_workspace_bytes(c.model, B, H, W, threads);
  const Guarded out(c.want.size()), space(static_cast<size_t>(bytes) / sizeof(float));
  y.data = out.data();
  char err[EVIT_ERROR_BYTES] = "";
  long before = 0;
  for (int i = allocations == nullptr; i < 2; i++) {  // the first may start threads
    if (allocations != nullptr) before = allocations();
    if (evit_run(c.model, &c.x, &y, space.data(), static_cast<size_t>(bytes), threads, err)) {
      fail(what, err);
    }
  }
  if (allocations != nullptr && allocations() != before) fail(what, "a run allocates memory");
  if (!out.intact() || !space.intact()) fail(what, "written outside the output or the workspace");
  return {out.data(), out.data() + c.want.size()};
}

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return sqrt(difference / norm);
}

void play(const Case& c) {
  const bool nchw = c.x.sizes[1] <= 4;  // pixels; tokens have at least 16 channels, at the end
  const std::vector<float> alone = run(c, nchw, 1);
  const double error = relative_error(alone, c.want);
  printf("%s %s %.2e\n", evit_isa(), c.folder.c_str(), error);
  if (!(error <= c.bound)) fail(c.folder, "wrong by more than " + std::to_string(c.bound));
  for (const int threads : kTeams) {
    if (run(c, nchw, threads) != alone) fail(c.folder, "a team gives other bits");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Case> cases;
  for (int i = 1; i < argc; i++) cases.push_back(read_case(argv[i]));
  std::string last;
  for (const char* isa : {"scalar", "neon", "avx2", "avx512"}) {
    // A name that this build does not know is another architecture's; one that the machine lacks
    // repeats the set below it.
    if (evit_set_max_isa(isa, nullptr) || last == evit_isa()) continue;
    last = evit_isa();
    for (const Case& c : cases) play(c);
  }
  puts(allocations == nullptr ? "ok" : "ok, no allocations");
  return 0;
}
