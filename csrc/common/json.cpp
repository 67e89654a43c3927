#include "common/json.h"

namespace evit {
namespace {

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

void append_utf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  const int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // continuation bytes
  constexpr unsigned char kLead[] = {0, 0xC0, 0xE0, 0xF0};
  out->push_back(static_cast<char>(kLead[tail] | code >> 6 * tail));
  for (int i = tail - 1; i >= 0; i--) {
    out->push_back(static_cast<char>(0x80 | (code >> 6 * i & 0x3F)));
  }
}

// Bytes of the UTF-8 sequence at p, 0 when it is not one (overlong forms and surrogates are not).
int utf8_length(const char* p, const char* end) {
  const auto byte = [p](int i) { return static_cast<unsigned char>(p[i]); };
  if (byte(0) < 0x80) return 1;
  const int length = byte(0) >= 0xF0 ? 4 : byte(0) >= 0xE0 ? 3 : 2;
  if (byte(0) < 0xC2 || byte(0) > 0xF4 || end - p < length) return 0;
  uint32_t code = byte(0) & (0x7F >> length);
  for (int i = 1; i < length; i++) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3F);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return code < kLeast[length] || code > 0x10FFFF || surrogate ? 0 : length;
}

}  // namespace

void JsonReader::skip_space() {
  while (at_ < end_ && is_space(*at_)) at_++;
}

bool JsonReader::accept(char c) {
  skip_space();
  if (at_ >= end_ || *at_ != c) return false;
  at_++;
  return true;
}

bool JsonReader::expect(char c) {
  if (accept(c)) return true;
  switch (c) {
    case '{':
      return fail("an opening brace was expected");
    case '}':
      return fail("a closing brace was expected");
    case '[':
      return fail("an opening bracket was expected");
    case ']':
      return fail("a closing bracket was expected");
    case ':':
      return fail("a colon was expected");
    case '"':
      return fail("a string was expected");
    default:
      return fail("a comma was expected");
  }
}

bool JsonReader::string(std::string* value) {
  value->clear();
  if (!expect('"')) return false;
  while (at_ < end_) {
    const unsigned char c = static_cast<unsigned char>(*at_);
    if (c == '"') {
      at_++;
      return true;
    }
    if (c < 0x20) return fail("a control character stands in a string");
    if (c == '\\') {
      if (!escape(value)) return false;
      continue;
    }
    const int length = utf8_length(at_, end_);
    if (length == 0) return fail("a string is not UTF-8");
    value->append(at_, static_cast<size_t>(length));
    at_ += length;
  }
  return fail("a string does not end");
}

bool JsonReader::escape(std::string* value) {
  at_++;  // the backslash
  if (at_ >= end_) return fail("a string does not end");
  const char c = *at_++;
  switch (c) {
    case '"':
    case '\\':
    case '/':
      value->push_back(c);
      return true;
    case 'b':
      value->push_back('\b');
      return true;
    case 'f':
      value->push_back('\f');
      return true;
    case 'n':
      value->push_back('\n');
      return true;
    case 'r':
      value->push_back('\r');
      return true;
    case 't':
      value->push_back('\t');
      return true;
    case 'u':
      break;
    default:
      return fail("an escape in a string is unknown");
  }
  uint32_t code = 0;
  if (!hex4(&code)) return false;
  if (code >= 0xD800 && code <= 0xDBFF) {
    uint32_t low = 0;
    if (end_ - at_ < 2 || at_[0] != '\\' || at_[1] != 'u') return fail("half a surrogate pair");
    at_ += 2;
    if (!hex4(&low)) return false;
    if (low < 0xDC00 || low > 0xDFFF) return fail("half a surrogate pair");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  } else if (code >= 0xDC00 && code <= 0xDFFF) {
    return fail("half a surrogate pair");
  }
  if (code == 0) return fail("a string holds a NUL");
  append_utf8(code, value);
  return true;
}

bool JsonReader::hex4(uint32_t* code) {
  if (end_ - at_ < 4) return fail("a string does not end");
  *code = 0;
  for (int i = 0; i < 4; i++) {
    const char c = *at_++;
    uint32_t digit = 0;
    if (c >= '0' && c <= '9') {
      digit = static_cast<uint32_t>(c - '0');
    } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
      digit = static_cast<uint32_t>((c | 0x20) - 'a' + 10);
    } else {
      return fail("four hexadecimal digits were expected");
    }
    *code = *code << 4 | digit;
  }
  return true;
}

bool JsonReader::integer(uint64_t* value) {
  skip_space();
  const char* first = at_;
  *value = 0;
  while (at_ < end_ && *at_ >= '0' && *at_ <= '9') {
    if (at_ - first >= 15) return fail("a number is too large");
    *value = *value * 10 + static_cast<uint64_t>(*at_++ - '0');
  }
  if (at_ == first || (*first == '0' && at_ - first > 1)) return fail("a number was expected");
  return true;
}

bool JsonReader::finish() {
  skip_space();
  return at_ == end_ || fail("something follows the end");
}

}  // namespace evit
