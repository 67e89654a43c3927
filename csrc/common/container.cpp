#include "common/container.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/crc32.h"
#include "common/json.h"

namespace evit {
namespace {

constexpr size_t kAlign = 4096;          // the blob starts at a page, so that it can be mapped
constexpr size_t kMaxHeader = 16 << 20;  // a program of ten thousand lines takes one
constexpr size_t kLengthBytes = 8;
constexpr size_t kCrcDigits = 8;

struct Error {
  const char* path;
  char* text;
  size_t capacity;

  __attribute__((format(printf, 2, 3))) bool operator()(const char* format, ...) const {
    char fact[400];
    va_list args;
    va_start(args, format);
    vsnprintf(fact, sizeof fact, format, args);
    va_end(args);
    if (capacity > 0) snprintf(text, capacity, "%s: %s", path, fact);
    return false;
  }
};

struct Header {
  std::vector<MetadataEntry> metadata;
  uint64_t blob_bytes = 0;
  bool has_metadata = false, has_blob = false;
  size_t crc_end = 0;  // position just after the closing quote of the checksum
};

bool add_once(std::vector<MetadataEntry>* list, std::string key, std::string value) {
  for (const MetadataEntry& entry : *list) {
    if (entry.key == key) return false;
  }
  list->push_back({std::move(key), std::move(value)});
  return true;
}

bool parse_metadata(JsonReader& json, Header* header, const Error& error) {
  if (header->has_metadata) return error("the header holds __metadata__ twice");
  header->has_metadata = true;
  if (!json.expect('{')) return false;
  if (json.accept('}')) return true;
  do {
    std::string key, value;
    if (!json.string(&key) || !json.expect(':') || !json.string(&value)) return false;
    if (key == "crc32") header->crc_end = json.position();
    const std::string name = key;
    if (!add_once(&header->metadata, std::move(key), std::move(value))) {
      return error("the metadata holds %.64s twice", name.c_str());
    }
  } while (json.accept(','));
  return json.expect('}');
}

// {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}
bool parse_blob(JsonReader& json, Header* header, const Error& error) {
  if (header->has_blob) return error("the header holds the tensor blob twice");
  header->has_blob = true;
  bool dtype = false, shape = false, offsets = false;
  uint64_t length = 0, begin = 0, end = 0;
  if (!json.expect('{')) return false;
  do {
    std::string key, value;
    if (!json.string(&key) || !json.expect(':')) return false;
    if (key == "dtype" && !dtype) {
      dtype = true;
      if (!json.string(&value)) return false;
      if (value != "U8")
        return error("the tensor blob should be of dtype U8, not %.16s", value.c_str());
    } else if (key == "shape" && !shape) {
      shape = true;
      if (!json.expect('[') || !json.integer(&length) || !json.expect(']')) return false;
    } else if (key == "data_offsets" && !offsets) {
      offsets = true;
      if (!json.expect('[') || !json.integer(&begin) || !json.expect(',') || !json.integer(&end) ||
          !json.expect(']')) {
        return false;
      }
    } else {
      return error(
          "the tensor blob should have dtype, shape and data_offsets once each, and has %.64s",
          key.c_str());
    }
  } while (json.accept(','));
  if (!json.expect('}')) return false;
  if (!dtype || !shape || !offsets) {
    return error("the tensor blob should have dtype, shape and data_offsets; one is missing");
  }
  if (begin != 0 || end != length) {
    return error("data_offsets of the tensor blob should be [0, %llu], not [%llu, %llu]",
                 static_cast<unsigned long long>(length), static_cast<unsigned long long>(begin),
                 static_cast<unsigned long long>(end));
  }
  header->blob_bytes = length;
  return true;
}

// False without a text in `error` when the JSON itself is wrong: the reader knows why.
bool parse_members(JsonReader& json, Header* header, const Error& error) {
  if (!json.expect('{')) return false;
  do {
    std::string key;
    if (!json.string(&key) || !json.expect(':')) return false;
    if (key == "__metadata__") {
      if (!parse_metadata(json, header, error)) return false;
    } else if (key == "blob") {
      if (!parse_blob(json, header, error)) return false;
    } else {
      return error(
          "it should hold one tensor, blob, and holds %.64s: not a file that evit_fast saved",
          key.c_str());
    }
  } while (json.accept(','));
  return json.expect('}') && json.finish();
}

bool parse_header(const char* text, size_t bytes, Header* header, const Error& error) {
  JsonReader json(text, bytes);
  error.text[0] = '\0';
  if (!parse_members(json, header, error)) {
    if (error.text[0] != '\0') return false;
    return error("the header is damaged at byte %zu: %s", kLengthBytes + json.position(),
                 json.reason());
  }
  if (!header->has_metadata) return error("it has no metadata: not a file that evit_fast saved");
  if (!header->has_blob) return error("it has no tensor blob: not a file that evit_fast saved");
  return true;
}

bool check_metadata(const EvitFile& file, const Error& error) {
  const char* format = file.find("format");
  if (format == nullptr || strcmp(format, "evit_fast") != 0) {
    return error(
        "metadata format should be evit_fast, and is %.64s: not a file that evit_fast saved",
        format == nullptr ? "missing" : format);
  }
  const char* version = file.find("format_version");
  if (version == nullptr || strcmp(version, "1") != 0) {
    return error(
        "metadata format_version should be 1, and is %.64s: save the model again, or update "
        "evit_fast",
        version == nullptr ? "missing" : version);
  }
  if (file.find("program") == nullptr) return error("metadata program is missing");
  return true;
}

// The checksum covers the whole file, its own eight digits taken as zeros.
bool check_crc(const EvitFile& file, size_t digits_at, const Error& error) {
  const char* all = static_cast<const char*>(file.mapping);
  const char* written = all + digits_at;
  for (size_t i = 0; i < kCrcDigits; i++) {
    if (strchr("0123456789abcdef", written[i]) == nullptr || written[i] == '\0') {
      return error("metadata crc32 should be 8 lower-case hexadecimal digits");
    }
  }
  const size_t after = digits_at + kCrcDigits;
  uint32_t crc = crc32(0, all, digits_at);
  crc = crc32(crc, "00000000", kCrcDigits);
  crc = crc32(crc, all + after, file.mapping_bytes - after);
  char digits[kCrcDigits + 1];
  snprintf(digits, sizeof digits, "%08x", static_cast<unsigned>(crc));
  if (memcmp(digits, written, kCrcDigits) != 0) {
    return error(
        "its contents have crc32 %s where the header says %.8s: the file is damaged; copy or save "
        "it again",
        digits, written);
  }
  return true;
}

bool map_file(const char* path, EvitFile* file, const Error& error) {
  // O_NONBLOCK: a named pipe is refused below instead of waited for.
  const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return error("cannot be opened: %s", strerror(errno));
  struct stat info;
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  const size_t bytes = regular ? static_cast<size_t>(info.st_size) : 0;
  if (!regular || bytes < kLengthBytes + 2) {
    close(fd);
    if (!regular) return error("is not a regular file");
    return error("has %zu bytes, too few for a saved model: the file is truncated", bytes);
  }
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  const int why = errno;
  close(fd);
  if (mapping == MAP_FAILED) return error("cannot be mapped: %s", strerror(why));
  file->mapping = mapping;
  file->mapping_bytes = bytes;
  return true;
}

bool read_mapped(EvitFile* file, const Error& error) {
  const char* all = static_cast<const char*>(file->mapping);
  uint64_t header_bytes = 0;
  memcpy(&header_bytes, all, kLengthBytes);
  const size_t left = file->mapping_bytes - kLengthBytes;
  if (header_bytes > kMaxHeader || header_bytes > left) {
    return error(
        "its first 8 bytes say that the header has %llu bytes, and %zu follow: not a saved model, "
        "or truncated",
        static_cast<unsigned long long>(header_bytes), left);
  }
  if ((kLengthBytes + header_bytes) % kAlign != 0) {
    return error(
        "its data should start at a multiple of %zu bytes, and starts at %llu: not a file that "
        "evit_fast saved",
        kAlign, static_cast<unsigned long long>(kLengthBytes + header_bytes));
  }
  Header header;
  if (!parse_header(all + kLengthBytes, header_bytes, &header, error)) return false;
  if (header.blob_bytes != left - header_bytes) {
    return error(
        "the tensor blob should have %llu bytes, and %zu are there: the file is truncated or "
        "damaged",
        static_cast<unsigned long long>(header.blob_bytes),
        left - static_cast<size_t>(header_bytes));
  }
  file->metadata = std::move(header.metadata);
  file->blob = static_cast<unsigned char*>(file->mapping) + kLengthBytes + header_bytes;
  file->blob_bytes = header.blob_bytes;
  if (!check_metadata(*file, error)) return false;
  const char* crc = file->find("crc32");
  // Eight characters as written, too: an escape would move the digits.
  const size_t digits_at = kLengthBytes + header.crc_end - 1 - kCrcDigits;
  if (crc == nullptr) return error("metadata crc32 is missing");
  if (strlen(crc) != kCrcDigits || memcmp(crc, all + digits_at, kCrcDigits) != 0) {
    return error("metadata crc32 should be 8 lower-case hexadecimal digits");
  }
  return check_crc(*file, digits_at, error);
}

}  // namespace

const char* EvitFile::find(const char* key) const {
  for (const MetadataEntry& entry : metadata) {
    if (entry.key == key) return entry.value.c_str();
  }
  return nullptr;
}

bool file_open(const char* path, EvitFile* file, char* err, size_t err_len) {
  char ignored[1];
  const Error error{path, err_len > 0 ? err : ignored, err_len > 0 ? err_len : sizeof ignored};
  bool good = false;
  try {
    *file = EvitFile();
    good = map_file(path, file, error) && read_mapped(file, error);
  } catch (...) {  // only memory can run out
    error("there is not enough memory to read the header");
  }
  if (!good) file_close(file);
  return good;
}

void file_close(EvitFile* file) {
  if (file->mapping != nullptr) munmap(file->mapping, file->mapping_bytes);
  *file = EvitFile();
}

}  // namespace evit
