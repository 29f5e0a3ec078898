// SPDX-License-Identifier: Apache-2.0
#include "base/text.h"

#include <charconv>
#include <cmath>

namespace ropewalk {
namespace {

template <class Number>
void AppendChars(std::string* out, Number number) {
  char buffer[40];
  out->append(buffer, std::to_chars(buffer, buffer + sizeof(buffer), number).ptr);
}

}  // namespace

void Append(std::string* out, std::string_view part) { out->append(part); }
void Append(std::string* out, char part) { out->push_back(part); }
void AppendNumber(std::string* out, int64_t number) { AppendChars(out, number); }
void AppendNumber(std::string* out, uint64_t number) { AppendChars(out, number); }
void AppendNumber(std::string* out, double number) {
  std::isnan(number) ? Append(out, "nan") : AppendChars(out, number);  // to_chars may write -nan
}
void AppendNumber(std::string* out, float number) {
  std::isnan(number) ? Append(out, "nan") : AppendChars(out, number);
}

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
  if (std::isnan(value)) return "nan";
  char text[32];
  const bool plain = value == std::floor(value) && std::fabs(value) < 1e6;  // 500000, not 5e+05
  const auto end = plain ? std::to_chars(text, text + sizeof text, static_cast<int64_t>(value))
                         : std::to_chars(text, text + sizeof text, value);
  return {text, end.ptr};
}

}  // namespace ropewalk
