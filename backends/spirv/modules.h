// What cmake/spirv.cmake embeds: the SPIR-V modules and the kernels' text, cut into chunks that lie side by side, so
// that they compress well. modules.cc puts them together again.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ropewalk {

struct SpirvPackPart {
  const char* name;  // of a module; the text comes last
  size_t size;
  uint8_t entry, dtype, vector;
};

struct SpirvPack {
  std::span<const uint8_t> bytes;
  bool gzip;   // or as they are, where there was no zlib
  int chunks;  // of each part, all but the last of one size
  std::span<const SpirvPackPart> parts;
};

extern const SpirvPack kSpirvPack;

}  // namespace ropewalk
