// SPDX-License-Identifier: Apache-2.0
#include "base/text.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

namespace ropewalk {
namespace {

// As std::to_chars writes a number, which has 105 KB of tables where libstdc++ is linked into Python's module, a
// thirtieth of it, for what goes into messages. At some powers of two this is a digit longer. It goes by the caller's
// rounding mode.
template <class Number>
std::string Shortest(Number number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
  constexpr int kMost = std::numeric_limits<Number>::max_digits10;
  char text[64];
  const auto reads_back = [&] {
    return (std::is_same_v<Number, float> ? static_cast<Number>(std::strtof(text, nullptr))
                                          : static_cast<Number>(std::strtod(text, nullptr))) == number;
  };
  int count = 0;  // of digits
  do {
    std::snprintf(text, sizeof(text), "%.*e", count, static_cast<double>(number));
  } while (++count < kMost && !reads_back());
  // A digit, the locale's point, the other digits, the exponent.
  const char* exponent = std::strchr(text, 'e');
  std::string digits;
  std::copy_if(static_cast<const char*>(text), exponent, std::back_inserter(digits),
               [](char c) { return c >= '0' && c <= '9'; });
  const int power = std::atoi(exponent + 1);
  std::string scientific = digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "") + exponent, plain;
  if (power < 0) {
    plain = "0." + std::string(static_cast<size_t>(-power - 1), '0') + digits;
  } else if (power < count - 1) {
    plain = digits.insert(static_cast<size_t>(power) + 1, ".");
  } else if (static_cast<size_t>(power) < scientific.size()) {
    std::snprintf(text, sizeof(text), "%.0f", std::fabs(static_cast<double>(number)));  // all digits of a large one
    plain = text;
  }
  const std::string& shorter = plain.empty() || plain.size() > scientific.size() ? scientific : plain;
  return (std::signbit(number) ? "-" : "") + shorter;
}

}  // namespace

void Append(std::string* out, std::string_view part) { out->append(part); }
void Append(std::string* out, char part) { out->push_back(part); }
void AppendNumber(std::string* out, int64_t number) { out->append(std::to_string(number)); }
void AppendNumber(std::string* out, uint64_t number) { out->append(std::to_string(number)); }
void AppendNumber(std::string* out, double number) { out->append(Shortest(number)); }
void AppendNumber(std::string* out, float number) { out->append(Shortest(number)); }

namespace {

// How many bytes at the start of `text` are one character in UTF-8; 0 if they are none.
size_t Utf8Length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(0);
  const size_t length = first < 0x80   ? 1
                        : first < 0xc2 ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                        : first < 0xf5 ? 4
                                       : 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Longer than need be, of UTF-16's halves, or beyond the last character.
  const unsigned second = byte(1);
  const bool wrong = (first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) ||
                     (first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f);
  return wrong ? 0 : length;
}

}  // namespace

std::string ValidUtf8(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
    out += length ? text.substr(0, length) : "\xef\xbf\xbd";  // U+FFFD
    text.remove_prefix(length ? length : 1);
  }
  return out;
}

std::string Hex(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<uint8_t>(byte) >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::string JsonString(std::string_view text) {
  std::string out = "\"";
  for (const char c : ValidUtf8(text)) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out += Hex({&c, 1});
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::string Show(double value) {
  const bool plain = value == std::floor(value) && std::fabs(value) < 1e6;  // 500000, not 5e+05
  return plain ? std::to_string(static_cast<int64_t>(value)) : Shortest(value);
}

}  // namespace ropewalk
