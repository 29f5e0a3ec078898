// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/tuned.h"

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string>
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

// With four decimals after a point, whatever the locale's is.
std::string Decimal(float number) {
  const int64_t units = std::llround(static_cast<double>(number) * 1e4), size = std::abs(units);
  const std::string digits = Text(size % 10000 + 10000);
  return Text(units < 0 ? "-" : "", size / 10000, ".", std::string_view(digits).substr(1));
}
template <class Number>
const char* Read(const char* at, const char* end, Number* number) {  // null if there is none
  const auto [after, error] = std::from_chars(at, end, *number);
  return error == std::errc() ? after : nullptr;
}
const char* Read(const char* at, const char* end, float* number) {
  int32_t whole = 0;
  const bool negative = at != end && *at == '-';
  at = Read(at, end, &whole);
  if (!at) return nullptr;
  double size = std::abs(static_cast<double>(whole)), unit = 1;
  if (at != end && *at == '.') {
    for (++at; at != end && *at >= '0' && *at <= '9'; ++at) size += (*at - '0') * (unit /= 10);
  }
  *number = static_cast<float>(negative ? -size : size);
  return at;
}

std::string Line(const RopeCudaTuned::Entry& entry) {
  const RopeCudaFeatures& f = entry.features;
  std::string line = Text(int{f.norm}, " ", int{f.table}, " ", int{f.store}, " ", int{f.regular});
  for (const float number : {f.lanes, f.bytes, f.turns, f.tokens}) Append(&line, Text(" ", Decimal(number)));
  for (const int number : entry.shape.numbers()) Append(&line, Text(" ", number));
  return line + "\n";
}
bool Parse(std::string_view line, RopeCudaTuned::Entry* entry) {
  const char *at = line.data(), *const end = at + line.size();
  const auto read = [&](auto* number) {
    if (at != line.data() && (at == end || *at++ != ' ')) return false;
    const char* after = Read(at, end, number);
    if (after) at = after;
    return after != nullptr;
  };
  RopeCudaFeatures& f = entry->features;
  std::array<uint8_t, std::tuple_size_v<decltype(entry->shape.numbers())>> numbers;
  const bool all = read(&f.norm) && read(&f.table) && read(&f.store) && read(&f.regular) && read(&f.lanes) &&
                   read(&f.bytes) && read(&f.turns) && read(&f.tokens) &&
                   std::ranges::all_of(numbers, [&](uint8_t& number) { return read(&number); });
  if (all) entry->shape = RopeCudaShape::Of(numbers);
  return all && at == end;
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
    if (!Parse(text.substr(0, end), &entry)) return {};
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
    const RopeCudaFeatures& f = entry.features;
    if (!std::isfinite(f.lanes + f.bytes + f.turns + f.tokens)) continue;  // of no heads, and not to be read again
    std::erase_if(all, [&](const auto& old) { return SameCall(old.features, entry.features); });
    all.push_back(entry);
  }
  std::string payload;
  for (const RopeCudaTuned::Entry& entry : all) Append(&payload, Line(entry));
  return PublishFile(*path, Sealed(kMagic, identity, payload), 0600);
}

}  // namespace ropewalk
