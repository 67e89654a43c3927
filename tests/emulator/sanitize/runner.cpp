// Runs a case under a sanitizer, whose runtime must be there before any of its libraries: so not in
// Python's process. Usage: runner CASE, with the contents of the buffers in CASE.data, which are
// written back. CASE has one line each for buffers and launches, in order:
//
//   buffer BYTES
//   launch LIBRARY ORDER SEED B H W WORDS WORD..   WORD: a number, or BUFFER+OFFSET behind a `b`
//
// Every buffer is one heap block of the exact size, so that AddressSanitizer sees its end.
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

struct Buffer {
  char* data;
  size_t bytes;
};

[[noreturn]] void fail(const std::string& what) {
  std::cerr << "runner: " << what << "\n";
  exit(2);
}

uint64_t word_of(const std::string& text, const std::vector<Buffer>& buffers) {
  if (text[0] != 'b') return static_cast<uint64_t>(std::stoll(text));
  size_t end;
  const size_t index = std::stoul(text.substr(1), &end);
  return reinterpret_cast<uint64_t>(buffers.at(index).data) + std::stoul(text.substr(end + 2));
}

void launch(std::istream& in, const std::vector<Buffer>& buffers) {
  std::string library, text;
  long B, H, W;
  int order;
  unsigned seed;
  size_t count;
  in >> library >> order >> seed >> B >> H >> W >> count;
  std::vector<uint64_t> words(count);
  for (uint64_t& word : words) {
    in >> text;
    word = word_of(text, buffers);
  }
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) fail(dlerror());
  using Launch = void (*)(const void*, long, long, long, int, unsigned);
  auto* entry = reinterpret_cast<Launch>(dlsym(handle, "launch"));
  if (!entry) fail(library + " has no launch");
  entry(words.data(), B, H, W, order, seed);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("expected one argument, a case");
  const std::string name = argv[1];
  std::ifstream in(name), contents(name + ".data", std::ios::binary);
  if (!in || !contents) fail("cannot read " + name);
  std::vector<Buffer> buffers;
  for (std::string verb; in >> verb;) {
    if (verb == "launch") {
      launch(in, buffers);
      continue;
    }
    Buffer b;
    in >> b.bytes;
    if (posix_memalign(reinterpret_cast<void**>(&b.data), 256, b.bytes) != 0) fail("no memory");
    contents.read(b.data, static_cast<std::streamsize>(b.bytes));
    buffers.push_back(b);
  }
  contents.close();
  std::ofstream out(name + ".data", std::ios::binary);
  for (const Buffer& b : buffers) {
    out.write(b.data, static_cast<std::streamsize>(b.bytes));
    free(b.data);
  }
  return 0;
}
