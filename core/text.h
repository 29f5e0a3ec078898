// Text from parts: Text("k has ", 5, " tokens").
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cmath>
#include <string>
#include <string_view>
#include <type_traits>

namespace ropewalk {

inline void Append(std::string* out, std::string_view part) { out->append(part); }
inline void Append(std::string* out, const char* part) { out->append(part); }
inline void Append(std::string* out, char part) { out->push_back(part); }
template <class Number>
requires std::is_arithmetic_v<Number>
void Append(std::string* out, Number number) {
  if constexpr (std::is_floating_point_v<Number>) {
    if (std::isnan(number)) return Append(out, "nan");  // to_chars may write -nan
  }
  char buffer[40];
  out->append(buffer, std::to_chars(buffer, buffer + sizeof(buffer), number).ptr);
}

template <class... Parts>
std::string Text(const Parts&... parts) {
  std::string out;
  (Append(&out, parts), ...);
  return out;
}

// As a JSON string, quoted.
inline std::string JsonString(std::string_view text) {
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
