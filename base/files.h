// Files whose bytes become code that runs: read only if nobody else could have written them. And digests of bytes, to
// name files and to see whether something changed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"
#include "base/text.h"

namespace ropewalk {

enum class Trust {
  kOwn,  // the file and its directory belong to this process's user or to root, and no other may write them
  kAny   // it lies where the library lies: who could write there could change the library
};

// "" and the file's bytes, or why it is not read: it is absent, no regular file, larger than `most`, not to be trusted.
std::string ReadFile(const std::string& path, Trust trust, size_t most, std::string* bytes);

// Makes the directory and those above it that are missing; `mode` is mkdir()'s. "" or why it cannot be had or trusted.
std::string MakeOwnDirectory(const std::string& path, unsigned mode);
// Why nothing is read from or written to the directory; "" if it is trusted, or not there yet.
std::string WhyDirectoryIsNotTrusted(const std::string& path);

// Written to a private file beside it, flushed, then renamed: a reader sees all of it or nothing. `mode` is open()'s.
Status PublishFile(const std::string& path, std::string_view bytes, unsigned mode);

// 128 bits of FNV-1a. Against accidents, not against enemies: those are kept out by who may write the files.
using Digest = std::array<uint8_t, 16>;
Digest DigestOf(std::string_view bytes);
inline std::string Hex(const Digest& digest) {
  return Hex(std::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

}  // namespace ropewalk
