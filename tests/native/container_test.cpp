// Reads a saved file damaged in every way there is time for; run under an address sanitizer by
// tests/test_saved_file.py. Argument: a good file. Prints "ok", or says what does not hold.
#include "common/container.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <random>
#include <string>
#include <vector>

#include "common/crc32.h"
#include "common/crc32_machine.h"

namespace {

using Bytes = std::vector<unsigned char>;

void require(bool holds, const char* fact, size_t where) {
  if (holds) return;
  fprintf(stderr, "container: %s (at %zu)\n", fact, where);
  exit(1);
}

Bytes read_all(const char* path) {
  FILE* f = fopen(path, "rb");
  require(f != nullptr, "the good file cannot be read", 0);
  Bytes bytes(1 << 20);
  bytes.resize(fread(bytes.data(), 1, bytes.size(), f));
  fclose(f);
  return bytes;
}

// One file in memory, rewritten for every damaged copy: a disk would take minutes.
struct Scratch {
  const int fd = memfd_create("damaged.evit", MFD_CLOEXEC);
  const std::string path = "/proc/self/fd/" + std::to_string(fd);

  void put(const Bytes& bytes) const {
    require(ftruncate(fd, 0) == 0, "the scratch file cannot be emptied", 0);
    const ssize_t n = pwrite(fd, bytes.data(), bytes.size(), 0);
    require(n == static_cast<ssize_t>(bytes.size()), "the scratch file cannot be written", 0);
  }

  bool opens() const {
    evit::EvitFile file;
    char err[300] = "";
    const bool good = evit::file_open(path.c_str(), &file, err, sizeof err);
    if (!good) {
      require(strlen(err) > path.size() + 2, "a refused file came without a reason", 0);
      require(file.mapping == nullptr && file.blob == nullptr, "a refused file stays mapped", 0);
    }
    evit::file_close(&file);
    return good;
  }
};

// Every length that the loops treat differently, at every alignment, from any register.
void checksums() {
  require(evit::crc32(0, "123456789", 9) == 0xCBF43926u, "crc32 is not zlib's", 0);
  if (!evit::crc32_machine_has()) return;
  std::mt19937 random(2);
  Bytes bytes(400);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  for (size_t from = 0; from < 16; from++) {
    for (size_t n = 0; n <= 300; n++) {
      const uint32_t start = random();
      require(
          evit::crc32_machine(start, &bytes[from], n) == evit::crc32_tables(start, &bytes[from], n),
          "the machine's crc32 differs from the tables'", n);
    }
  }
}

void bits(const Bytes& good, const Scratch& scratch) {
  for (size_t i = 0; i < good.size(); i++) {
    for (int bit = 0; bit < 8; bit++) {
      const unsigned char flipped = good[i] ^ static_cast<unsigned char>(1 << bit);
      require(pwrite(scratch.fd, &flipped, 1, static_cast<off_t>(i)) == 1, "write", i);
      require(!scratch.opens(), "a flipped bit was not noticed", i);
    }
    require(pwrite(scratch.fd, &good[i], 1, static_cast<off_t>(i)) == 1, "write", i);
  }
  require(scratch.opens(), "the good file does not open", 0);
}

void lengths(const Bytes& good, const Scratch& scratch) {
  for (size_t n = 0; n < good.size(); n++) {
    scratch.put(Bytes(good.begin(), good.begin() + static_cast<long>(n)));
    require(!scratch.opens(), "a truncated file was not noticed", n);
  }
  Bytes longer = good;
  longer.push_back(0);
  scratch.put(longer);
  require(!scratch.opens(), "a byte too many was not noticed", good.size());
}

// The header's text rearranged at random; most copies stop the parser, each at another place.
void headers(const Bytes& good, const Scratch& scratch, size_t text_bytes) {
  std::mt19937 random(1);
  const std::string pieces[] = {
      "{",    "}",    "[",        "]",       ",",   ":",
      "\"",   "\\",   "\\u",      "\\ud800", "0",   "18446744073709551616",
      "\x01", "\xff", "\xc0\x80", "blob",    "null"};
  for (int round = 0; round < 20'000; round++) {
    Bytes damaged = good;
    for (unsigned i = 0; i <= random() % 3; i++) {
      const size_t at = 8 + random() % text_bytes;
      const std::string& piece = pieces[random() % (sizeof pieces / sizeof *pieces)];
      memcpy(damaged.data() + at, piece.data(), piece.size());
      const size_t from = 8 + random() % text_bytes;
      if (random() % 2 == 0) memmove(damaged.data() + at, damaged.data() + from, random() % 40);
    }
    if (damaged == good) continue;
    scratch.put(damaged);
    require(!scratch.opens(), "a rewritten header was not noticed", static_cast<size_t>(round));
  }
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 2, "one argument is needed", 0);
  checksums();
  const Bytes good = read_all(argv[1]);
  uint64_t header = 0;
  memcpy(&header, good.data(), sizeof header);
  size_t text = header;
  while (text > 0 && good[8 + text - 1] == ' ') text--;
  const Scratch scratch;
  require(scratch.fd >= 0, "there is no memory for a file", 0);
  scratch.put(good);
  bits(good, scratch);
  lengths(good, scratch);
  headers(good, scratch, text);
  puts("ok");
  return 0;
}
