// Text from parts: Text("k has ", 5, " tokens").
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

namespace ropewalk {

// Not inline: messages are made of hundreds of parts, and none is made where time matters.
void Append(std::string* out, std::string_view part);
void Append(std::string* out, char part);
void AppendNumber(std::string* out, int64_t number);
void AppendNumber(std::string* out, uint64_t number);
void AppendNumber(std::string* out, double number);
void AppendNumber(std::string* out, float number);

inline void Append(std::string* out, const char* part) { Append(out, std::string_view(part)); }
template <class Number>
requires std::is_arithmetic_v<Number>
void Append(std::string* out, Number number) {
  if constexpr (std::is_floating_point_v<Number>) {
    AppendNumber(out, number);
  } else if constexpr (std::is_signed_v<Number>) {
    AppendNumber(out, int64_t{number});
  } else {
    AppendNumber(out, uint64_t{number});
  }
}

template <class... Parts>
std::string Text(const Parts&... parts) {
  std::string out;
  (Append(&out, parts), ...);
  return out;
}

// Two digits for each byte.
std::string Hex(std::string_view bytes);
// With U+FFFD for each byte that is not UTF-8: paths may hold any.
std::string ValidUtf8(std::string_view text);
std::string JsonString(std::string_view text);  // quoted; valid JSON whatever the text

// A short text that reads back as `value`.
std::string Show(double value);

}  // namespace ropewalk
