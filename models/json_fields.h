// Reads the fields of one JSON object by name, for configurations: every wrong value becomes one sentence that names
// the field and the file, and what was never asked for is refused. Nothing here throws.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "base/text.h"

namespace ropewalk {

using Json = nlohmann::json;

// A value with all that it holds. The library's own destructor allocates, and ends the process if it cannot.
struct OwnedJson : Json {
  OwnedJson() = default;  // NOLINT(bugprone-exception-escape): null allocates nothing
  OwnedJson(const OwnedJson&) = delete;
  OwnedJson& operator=(const OwnedJson&) = delete;
  ~OwnedJson();  // NOLINT(bugprone-exception-escape): takes the value apart without allocating
};

inline constexpr size_t kMostJsonBytes = size_t{8} << 20;  // 60 MB of a hostile one took 16 seconds

// Parses `text`, called `name` in messages, into an object. Nesting beyond 64 levels, a key twice in one object and
// more than kMostJsonBytes are refused.
Status ParseJsonObject(std::string_view text, std::string_view name, OwnedJson* out);

// A value as messages show it: one line, not long.
std::string Show(const Json& value);
// A key as messages show it, where it comes from the text and may be anything: escaped, not long.
std::string ShowKey(std::string_view key);

class Fields {
 public:
  // `where` is what stands before a field's name in messages: "config.json: " or "config.json: rope_parameters.".
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  const Json& object() const { return object_; }
  std::string Name(std::string_view key) const { return where_ + std::string(key); }

  // The field, or null where it is absent or null. From then on the field counts as known.
  const Json* Find(std::string_view key);
  bool Has(std::string_view key) { return Find(key) != nullptr; }

  // The value, if present; a wrong kind or one outside [low, high] is an error.
  Status Number(std::string_view key, double low, double high, std::optional<double>* out);
  Status Integer(std::string_view key, int64_t low, int64_t high, std::optional<int64_t>* out);
  Status Boolean(std::string_view key, std::optional<bool>* out);
  Status Text(std::string_view key, std::optional<std::string>* out);
  Status Numbers(std::string_view key, double low, double high, std::optional<std::vector<double>>* out);
  Status Integers(std::string_view key, int64_t low, int64_t high, std::optional<std::vector<int64_t>>* out);

  // Counts as known, though nobody looks at it.
  void Ignore(std::string_view key) { known_.emplace(key); }
  bool IsKnown(std::string_view key) const { return known_.find(key) != known_.end(); }

  // Names the first field that is not null and that nobody asked for; `owner` says who would have to know it.
  Status RefuseOthers(std::string_view owner) const;

 private:
  const Json& object_;
  std::string where_;
  std::set<std::string, std::less<>> known_;
};

}  // namespace ropewalk
