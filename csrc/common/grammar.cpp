#include "common/grammar.h"

#include <algorithm>
#include <cstdlib>

namespace evit {
namespace {

constexpr int kMaxChannels = 4096;
constexpr size_t kMaxProgramBytes = 1 << 20;

struct DTypeInfo {
  const char* name;
  int bytes;
};
constexpr DTypeInfo kDTypeInfo[kDTypes] = {
    {"float32", 4}, {"float64", 8}, {"float16", 2}, {"bfloat16", 2}};

std::string quoted(const std::string& s) {
  std::string out = "'";
  for (char c : s.substr(0, 60)) out += (c >= 32 && c < 127) ? c : '?';
  return out + (s.size() > 60 ? "...'" : "'");
}

bool fail(std::string* error, const std::string& message) {
  *error = message;
  return false;
}

// A canonical non-negative decimal: no sign, no leading zeros, at most 15 digits.
bool parse_number(const std::string& s, int64_t* value) {
  if (s.empty() || s.size() > 15 || (s.size() > 1 && s[0] == '0')) return false;
  *value = 0;
  for (char c : s) {
    if (c < '0' || c > '9') return false;
    *value = *value * 10 + (c - '0');
  }
  return true;
}

std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts(1);
  for (char c : s) {
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

bool check_range(const std::string& where, const Field& f, int64_t v, std::string* error) {
  const bool odd = f.value == nullptr;
  if (v >= f.lo && v <= f.hi && (odd ? v % 2 == 1 : v % f.multiple == 0)) return true;
  std::string rule = odd ? "odd" : "a multiple of " + std::to_string(f.multiple);
  if (!odd && f.multiple == 1) rule = "an integer";
  return fail(error, where + ": " + f.name + "=" + std::to_string(v) + ", expected " + rule +
                         " from " + std::to_string(f.lo) + " to " + std::to_string(f.hi));
}

}  // namespace

const char* dtype_name(DType d) { return kDTypeInfo[(int)d].name; }
int dtype_bytes(DType d) { return kDTypeInfo[(int)d].bytes; }

CgaShape Op::cga() const {
  CgaShape s{C, heads, dk, window, {}};
  std::copy(ks.begin(), ks.end(), s.ks);
  return s;
}

const std::vector<OpGrammar>& grammar() {
  static const std::vector<OpGrammar> table = {
      {OpKind::kStem, "stem", {{"in", &Op::in, 1, 64, 1}, {"C", &Op::C, 64, 1024, 64}}},
      {OpKind::kDwFfn,
       "dw_ffn",
       {{"C", &Op::C, 16, kMaxChannels, 16}, {"F", &Op::F, 16, 4 * kMaxChannels, 16}}},
      {OpKind::kCga,
       "cga",
       {{"C", &Op::C, 16, kMaxChannels, 16},
        {"heads", &Op::heads, 1, kMaxHeads, 1},
        {"dk", &Op::dk, 16, 16, 16},
        {"window", &Op::window, 1, 32, 1},
        {"ks", nullptr, 1, 7, 1}}},
      {OpKind::kPatchMerge,
       "patch_merge",
       {{"C", &Op::C, 16, kMaxChannels, 16},
        {"F", &Op::F, 16, 4 * kMaxChannels, 16},
        {"R", &Op::R, 16, kMaxChannels, 16},
        {"CO", &Op::CO, 16, kMaxChannels, 16}}},
      {OpKind::kClassifier,
       "classifier",
       {{"C", &Op::C, 16, kMaxChannels, 16}, {"N", &Op::N, 0, 65536, 1}}},
  };
  return table;
}

bool parse_line(const std::string& line, Op* op, std::string* error) {
  const std::vector<std::string> words = split(line, ' ');
  const OpGrammar* g = nullptr;
  for (const OpGrammar& candidate : grammar())
    if (words[0] == candidate.name) g = &candidate;
  if (!g) {
    return fail(error, "program: unknown op " + quoted(words[0]) +
                           "; expected stem, dw_ffn, cga, patch_merge or classifier");
  }
  *op = Op();
  op->kind = g->kind;
  size_t next = 1;
  const auto take = [&](const char* name, std::string* value) {
    const std::string prefix = std::string(name) + "=";
    if (next >= words.size() || words[next].compare(0, prefix.size(), prefix) != 0) return false;
    *value = words[next++].substr(prefix.size());
    return true;
  };
  std::string text;
  int64_t v = 0;
  for (const Field& f : g->fields) {
    if (!take(f.name, &text)) {
      return fail(error, std::string(g->name) + ": expected field " + f.name + "= at word " +
                             std::to_string(next + 1) + " of " + quoted(line));
    }
    for (const std::string& item : f.value ? std::vector<std::string>{text} : split(text, ',')) {
      if (!parse_number(item, &v))
        return fail(error,
                    std::string(g->name) + ": " + f.name + "=" + quoted(item) + " is not a number");
      if (!check_range(g->name, f, v, error)) return false;
      if (f.value)
        op->*f.value = (int)v;
      else
        op->ks.push_back((int)v);
      if (op->ks.size() > (size_t)kMaxHeads) return fail(error, "cga: ks has more than 16 values");
    }
  }
  if (take("dtype", &text)) {
    int d = 0;
    while (d < kDTypes && text != kDTypeInfo[d].name) d++;
    if (d == kDTypes || d == 0) {
      return fail(error, std::string(g->name) + ": dtype=" + quoted(text) +
                             ", expected float64, float16 or bfloat16 (float32 is left out)");
    }
    op->dtype = (DType)d;
  }
  if (!take("at", &text) || !parse_number(text, &op->at) || next != words.size()) {
    return fail(error,
                std::string(g->name) + ": expected at=<bytes> as the last word of " + quoted(line));
  }
  if (op->at % 64)
    return fail(error, std::string(g->name) + ": at=" + text + ", expected a multiple of 64");
  if (op->kind == OpKind::kCga) {
    if (op->C % op->heads || op->C / op->heads % 16) {
      return fail(error, "cga: C=" + std::to_string(op->C) +
                             ", heads=" + std::to_string(op->heads) +
                             ", expected C/heads to be a multiple of 16");
    }
    if ((int)op->ks.size() != op->heads) {
      return fail(error, "cga: ks has " + std::to_string(op->ks.size()) + " values for " +
                             std::to_string(op->heads) + " heads");
    }
  }
  return true;
}

bool parse_program(const std::string& text, int64_t blob_bytes, std::vector<Op>* ops,
                   std::string* error) {
  ops->clear();
  if (text.size() > kMaxProgramBytes) return fail(error, "program: longer than 1 MiB");
  const std::vector<std::string> lines = split(text, '\n');
  int channels = 0;
  DType dtype = DType::kFloat32;
  for (size_t i = 0; i < lines.size(); i++) {
    const std::string where = "program line " + std::to_string(i + 1) + ": ";
    Op op;
    if (!parse_line(lines[i], &op, error)) return fail(error, where + *error);
    if (op.kind == OpKind::kStem && i > 0)
      return fail(error, where + "stem can only be the first op");
    if (i > 0 && ops->back().kind == OpKind::kClassifier)
      return fail(error, where + "classifier can only be the last op");
    if (i > 0 && op.C != channels) {
      return fail(error, where + "C=" + std::to_string(op.C) + " does not continue the " +
                             std::to_string(channels) + " channels of the line before");
    }
    // Lines may differ in reduced precision, but float64 activations do not mix with others.
    if (i > 0 && (op.dtype == DType::kFloat64) != (dtype == DType::kFloat64))
      return fail(error, where + "dtype=float64 cannot be mixed with other dtypes");
    dtype = op.dtype;
    channels = op.kind == OpKind::kPatchMerge ? op.CO : op.C;
    if (blob_bytes >= 0 && op.at + op_bytes(op) > blob_bytes) {
      return fail(error, where + "needs bytes up to " + std::to_string(op.at + op_bytes(op)) +
                             " of a blob of " + std::to_string(blob_bytes));
    }
    ops->push_back(std::move(op));
  }
  return true;
}

}  // namespace evit
