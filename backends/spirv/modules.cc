// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/modules.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backends/spirv/plan.h"
#include "base/fork.h"

#ifdef ROPEWALK_WITH_ZLIB
#include <zlib.h>
#endif

namespace ropewalk {
namespace {

#ifdef ROPEWALK_WITH_ZLIB
bool Inflate(std::span<const uint8_t> packed, std::span<uint8_t> out) {
  z_stream stream = {};
  stream.next_in = const_cast<Bytef*>(packed.data());
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = out.data();
  stream.avail_out = static_cast<uInt>(out.size());
  constexpr int kGzip = 16;  // whose checksum is held to
  if (inflateInit2(&stream, kGzip + MAX_WBITS) != Z_OK) return false;
  const int result = inflate(&stream, Z_FINISH);
  const bool whole = result == Z_STREAM_END && stream.avail_out == 0;
  return inflateEnd(&stream) == Z_OK && whole;
}
#else
bool Inflate(std::span<const uint8_t>, std::span<uint8_t>) { return false; }
#endif

struct Unpacked {
  std::vector<uint64_t> memory;  // aligned as drivers want it
  std::vector<SpirvModule> modules;
  const char* source = "";
};

// Nothing if the pack does not open, which is a broken build.
Unpacked Unpack() {
  const auto& [bytes, gzip, chunks, parts] = kSpirvPack;
  Unpacked out;
  size_t total = 0, words = 0;
  const auto words_of = [](size_t size) { return size / sizeof(uint64_t) + 1; };  // with a zero at the end
  for (const SpirvPackPart& part : parts) {
    total += part.size;
    words += words_of(part.size);
  }
  std::vector<uint8_t> inflated(gzip ? total : 0);
  if (gzip && !Inflate(bytes, inflated)) return out;
  const std::span<const uint8_t> mixed = gzip ? std::span<const uint8_t>(inflated) : bytes;
  if (mixed.size() != total) return out;

  out.memory.resize(words);
  std::vector<uint8_t*> begins;
  auto* begin = reinterpret_cast<uint8_t*>(out.memory.data());
  for (const SpirvPackPart& part : parts) {
    begins.push_back(begin);
    begin += words_of(part.size) * sizeof(uint64_t);
  }
  size_t at = 0;
  for (size_t chunk = 0; chunk < static_cast<size_t>(chunks); ++chunk) {
    for (size_t i = 0; i < parts.size(); ++i) {
      const size_t whole = (parts[i].size + static_cast<size_t>(chunks) - 1) / static_cast<size_t>(chunks);
      const size_t from = std::min(chunk * whole, parts[i].size), size = std::min(whole, parts[i].size - from);
      std::memcpy(begins[i] + from, mixed.data() + at, size);
      at += size;
    }
  }
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    out.modules.push_back({parts[i].name, begins[i], parts[i].size, parts[i].entry, parts[i].dtype, parts[i].vector});
  }
  out.source = reinterpret_cast<const char*>(begins.back());
  return out;
}

// When first wanted, which takes 5 ms; kept for good.
const Unpacked* MakeUnpacked() { return new Unpacked(Unpack()); }
const Unpacked& GetUnpacked() { return OnceMade<Unpacked, MakeUnpacked>::Get(); }

}  // namespace

std::span<const SpirvModule> RopeSpirvModules() { return GetUnpacked().modules; }
const char* RopeOpenClSource() { return GetUnpacked().source; }

}  // namespace ropewalk
