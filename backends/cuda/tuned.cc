// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/tuned.h"

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <string_view>
#include <tuple>

#include "backends/cuda/cache.h"
#include "base/files.h"
#include "base/text.h"

namespace ropewalk {
namespace {

constexpr std::string_view kMagic = "RWSHAPE1";
constexpr size_t kMostBytes = size_t{16} << 20;

std::string Identity(const std::string& device, int driver_version) {
  return Text("shapes for ", device, ", driver for CUDA ", driver_version, ", Ropewalk ", ropewalk_version());
}
// "" if nothing is kept.
std::string PathOf(const std::string& identity) {
  const std::string directory = DiskCacheDirectory();
  return directory.empty() ? "" : Text(directory, "/", Hex(DigestOf(identity)), ".shapes");
}

std::string Line(const RopeCudaTuned::Entry& entry) {
  const RopeCudaFeatures& f = entry.features;
  char features[256];
  std::snprintf(features, sizeof(features), "%d %d %d %d %.4f %.4f %.4f %.4f", f.norm, f.table, f.store, f.regular,
                static_cast<double>(f.lanes), static_cast<double>(f.bytes), static_cast<double>(f.turns),
                static_cast<double>(f.tokens));
  std::string line = features;
  for (const int number : entry.shape.numbers()) Append(&line, Text(" ", number));
  return line + "\n";
}
bool Parse(const std::string& line, RopeCudaTuned::Entry* entry) {
  RopeCudaFeatures& f = entry->features;
  int read = 0;
  if (std::sscanf(line.c_str(), "%hhu %hhu %hhu %hhu %f %f %f %f%n", &f.norm, &f.table, &f.store, &f.regular, &f.lanes,
                  &f.bytes, &f.turns, &f.tokens, &read) != 8) {
    return false;
  }
  std::array<uint8_t, std::tuple_size_v<decltype(entry->shape.numbers())>> numbers;
  const char *at = line.c_str() + read, *const end = line.c_str() + line.size();
  for (uint8_t& number : numbers) {
    if (at == end || *at != ' ') return false;
    const auto [after, error] = std::from_chars(at + 1, end, number);
    if (error != std::errc()) return false;
    at = after;
  }
  entry->shape = RopeCudaShape::Of(numbers);
  return at == end && std::isfinite(f.lanes) && std::isfinite(f.bytes) && std::isfinite(f.turns) &&
         std::isfinite(f.tokens);
}

// A file that is not as it was written, or of another device, has no entries.
std::vector<RopeCudaTuned::Entry> Read(const std::string& identity) {
  const std::string path = PathOf(identity);
  std::string bytes;
  std::string_view of, payload;
  if (path.empty() || !ReadFile(path, Trust::kOwn, kMostBytes, &bytes).empty() ||
      !Unseal(bytes, kMagic, &of, &payload) || of != identity) {
    return {};
  }
  return ParseTunedShapes(payload);
}

bool SameCall(const RopeCudaFeatures& a, const RopeCudaFeatures& b) {
  const auto same = [](float x, float y) { return std::abs(x - y) < 1e-3f; };
  return a.norm == b.norm && a.table == b.table && a.store == b.store && a.regular == b.regular &&
         same(a.lanes, b.lanes) && same(a.bytes, b.bytes) && same(a.turns, b.turns) && same(a.tokens, b.tokens);
}

}  // namespace

std::vector<RopeCudaTuned::Entry> ParseTunedShapes(std::string_view text) {
  std::vector<RopeCudaTuned::Entry> entries;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    RopeCudaTuned::Entry entry;
    if (!Parse(std::string(text.substr(0, end)), &entry)) return {};
    entries.push_back(entry);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return entries;
}

const RopeCudaTuned* LoadTunedShapes(const std::string& device, int driver_version) {
  std::vector<RopeCudaTuned::Entry> entries = Read(Identity(device, driver_version));
  return entries.empty() ? nullptr : new RopeCudaTuned{std::move(entries)};
}

Status KeepTunedShapes(const std::string& device, int driver_version, const std::vector<RopeCudaTuned::Entry>& entries,
                       std::string* path) {
  const std::string identity = Identity(device, driver_version);
  *path = PathOf(identity);
  if (path->empty()) {
    return Status::Unavailable(Text("tune: there is nowhere to keep what was found: ", DiskCacheText()));
  }
  if (const std::string why = MakeOwnDirectory(DiskCacheDirectory(), 0700); !why.empty()) {
    return Status::Unavailable(Text("tune: what was found cannot be kept in ", DiskCacheDirectory(), ": ", why));
  }
  std::vector<RopeCudaTuned::Entry> all = Read(identity);
  for (const RopeCudaTuned::Entry& entry : entries) {
    std::erase_if(all, [&](const auto& old) { return SameCall(old.features, entry.features); });
    all.push_back(entry);
  }
  std::string payload;
  for (const RopeCudaTuned::Entry& entry : all) Append(&payload, Line(entry));
  return PublishFile(*path, Sealed(kMagic, identity, payload), 0600);
}

}  // namespace ropewalk
