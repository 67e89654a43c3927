// A saved model: one safetensors file with a single tensor `blob`, text metadata, and a CRC-32 over
// all of it. The format is described in docs/format.md; Python writes it (evit_fast/container.py),
// this reads it.
#pragma once

#include <stddef.h>

#include <string>
#include <vector>

namespace evit {

struct MetadataEntry {
  std::string key, value;  // UTF-8, without NUL
};

struct EvitFile {
  std::vector<MetadataEntry> metadata;  // in the order of the file
  unsigned char* blob = nullptr;        // 4096-byte aligned; private pages: writing changes no file
  size_t blob_bytes = 0;
  void* mapping = nullptr;
  size_t mapping_bytes = 0;

  const char* find(const char* key) const;  // null when the key is absent
};

// Maps the file and checks its structure, format, version and checksum. False: `err` holds one
// sentence and `file` is empty. Throws nothing, whatever the file holds.
bool file_open(const char* path, EvitFile* file, char* err, size_t err_len);

// Releases the mapping; a second call does nothing.
void file_close(EvitFile* file);

}  // namespace evit
