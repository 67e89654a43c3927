// The JSON of a safetensors header: objects of strings, and non-negative integers. Strict:
// everything is range-checked, anything else is an error with a reason and a position.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace evit {

class JsonReader {
 public:
  JsonReader(const char* text, size_t bytes) : begin_(text), at_(text), end_(text + bytes) {}

  // Each skips white space first, and returns false after an error; reason() then says what was
  // expected.
  bool expect(char c);
  bool string(std::string* value);  // decoded to UTF-8
  bool integer(uint64_t* value);
  bool finish();  // only white space is left

  bool accept(char c);  // consumes c if it comes next
  size_t position() const { return static_cast<size_t>(at_ - begin_); }
  const char* reason() const { return reason_; }

 private:
  bool fail(const char* reason) {
    reason_ = reason;
    return false;
  }
  void skip_space();
  bool escape(std::string* value);
  bool hex4(uint32_t* code);

  const char *begin_, *at_, *end_;
  const char* reason_ = "";
};

}  // namespace evit
