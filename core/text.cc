// SPDX-License-Identifier: Apache-2.0
#include "core/text.h"

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

std::string JsonString(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      constexpr char kHex[] = "0123456789abcdef";
      out += "\\u00";
      out += kHex[(c >> 4) & 0xf];
      out += kHex[c & 0xf];
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace ropewalk
