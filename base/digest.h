// Digests of bytes, to name files and to see whether something changed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace ropewalk {

// 128 bits of FNV-1a. Against accidents, not against enemies: those are kept out by who may write the files, see
// base/files.h.
using Digest = std::array<uint8_t, 16>;
Digest DigestOf(std::string_view bytes);

// Two digits for each byte.
std::string Hex(std::string_view bytes);
inline std::string Hex(const Digest& digest) {
  return Hex(std::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

}  // namespace ropewalk
