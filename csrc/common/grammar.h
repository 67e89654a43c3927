// The grammar of a program: op names, fields, legal ranges, weight sections. The one table; Python
// reads it through the binding, docs/format.md describes it. Not included by instruction-set files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/shapes.h"

namespace evit {

enum class OpKind { kStem, kDwFfn, kCga, kPatchMerge, kClassifier };
constexpr int kOpKinds = 5;

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
constexpr int kDTypes = 4;
const char* dtype_name(DType d);
int dtype_bytes(DType d);

// One line of a program. Fields that the op does not have stay 0.
struct Op {
  OpKind kind = OpKind::kStem;
  DType dtype = DType::kFloat32;
  int in = 0, C = 0, F = 0, R = 0, CO = 0, N = 0, heads = 0, dk = 0, window = 0;
  std::vector<int> ks;  // one per head
  int64_t at = 0;       // byte offset of its sections in the blob

  StemShape stem() const { return {in, C}; }
  DwFfnShape dw_ffn() const { return {C, F}; }
  CgaShape cga() const;
  PatchMergeShape patch_merge() const { return {C, F, R, CO}; }
  ClassifierShape classifier() const { return {C, N}; }
};

struct Field {
  const char* name;
  int Op::* value;  // null: the list ks
  int lo, hi, multiple;
};

struct OpGrammar {
  OpKind kind;
  const char* name;
  std::vector<Field> fields;  // in canonical order; dtype (optional) and at follow
};
const std::vector<OpGrammar>& grammar();

// How a section's natural array becomes bytes; see layout.h.
enum class SectionKind { kPanel, kConvPlanar, kConvNhwc, kConvFirst, kDepthwise, kVector, kScores };
const char* section_kind_name(SectionKind k);

struct Section {
  std::string name;
  SectionKind kind;
  std::vector<int> dims;  // natural shape
  DType dtype;            // of the packed elements
  int64_t offset;         // bytes from the op's `at`; a multiple of 64
  int64_t elements;       // packed elements, padding included
  int64_t bytes() const { return elements * dtype_bytes(dtype); }
};

// The sections of an op in the order of use. op_bytes is the end of the last one, rounded up to 64.
std::vector<Section> op_sections(const Op& op);
int64_t op_bytes(const Op& op);

// Both return false and one sentence in *error. A program that passes has legal fields, agreeing
// channels, and touches nothing outside [0, blob_bytes) (skipped when negative).
bool parse_line(const std::string& line, Op* op, std::string* error);
bool parse_program(const std::string& text, int64_t blob_bytes, std::vector<Op>* ops,
                   std::string* error);

}  // namespace evit
