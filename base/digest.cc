// SPDX-License-Identifier: Apache-2.0
#include "base/digest.h"

namespace ropewalk {

Digest DigestOf(std::string_view bytes) {
  using uint128 = unsigned __int128;
  constexpr uint128 kPrime = (static_cast<uint128>(1) << 88) + 0x13b;
  uint128 hash = (static_cast<uint128>(0x6c62272e07bb0142u) << 64) + 0x62b821756295c58du;
  for (const char byte : bytes) hash = (hash ^ static_cast<uint8_t>(byte)) * kPrime;
  Digest digest;
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(hash >> (120 - 8 * i));
  return digest;
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

}  // namespace ropewalk
