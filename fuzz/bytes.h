// The bytes of a fuzz input, taken one after the other as choices and numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ropewalk {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() { return at_ < size_ ? data_[at_++] : 0; }
  bool OneIn(int n) { return Next() % n == n - 1; }  // zeros, which follow the end, mean no
  // NOLINTNEXTLINE(bugprone-signed-char-misuse): -128 to 127 is meant
  int64_t Small() { return static_cast<int8_t>(Next()); }
  int64_t Wide() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | Next();
    return static_cast<int64_t>(value);
  }
  std::string Some(size_t most) {
    std::string text(std::min({size_t{Next()}, most, size_ - at_}), '\0');
    for (char& c : text) c = static_cast<char>(Next());
    return text;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

}  // namespace ropewalk
