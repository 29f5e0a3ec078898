// The checks behind json_fields.h.
// SPDX-License-Identifier: Apache-2.0
#include "core/json_fields.h"

#include <charconv>
#include <cmath>

namespace ropewalk {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxBytes = size_t{64} << 20;
constexpr size_t kMaxShown = 60;  // of a value, in a message

// Python writes infinities and NaN as bare words, which JSON does not have. As strings they parse, and are refused by
// name where a number is wanted.
std::string QuoteBareWords(std::string_view text) {
  std::string out;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string && text[i] == '\\' && i + 1 < text.size()) {
      out += text[i++];
    } else if (text[i] == '"') {
      in_string = !in_string;
    } else if (!in_string) {
      for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
        if (text.substr(i, word.size()) != word) continue;
        out.append("\"").append(word).append("\"");
        i += word.size();
        break;
      }
      if (i >= text.size()) break;
      if (text[i] == '"') in_string = true;  // just after a word: broken anyway, and the parser says so
    }
    out += text[i];
  }
  return out;
}

// Recursion follows the nesting (in the parser's callback and in comparisons), so its depth is bounded beforehand.
bool NestsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxDepth) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

}  // namespace

Status ParseJsonObject(std::string_view text, std::string_view name, Json* out) {
  const std::string file(name);
  if (text.size() > kMaxBytes) return Status::Invalid(file + ": is larger than 64 MiB");
  if (NestsTooDeep(text)) return Status::Invalid(file + ": nests deeper than 64 levels");
  std::vector<std::set<std::string>> keys;
  std::string twice;
  const auto watch = [&](int, Json::parse_event_t event, Json& value) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second && twice.empty()) {
      twice = Show(value);
    }
    return true;
  };
  try {
    *out = Json::parse(QuoteBareWords(text), watch);
  } catch (const Json::exception& error) {
    const std::string what = error.what();  // "[json.exception.parse_error.101] parse error at line 1, .."
    const size_t end = what.find("] ");
    std::string detail = end == std::string::npos ? what : what.substr(end + 2);
    if (detail.size() > 200) detail = detail.substr(0, 200) + "..";
    return Status::Invalid(file + ": is not JSON: " + detail);
  }
  if (!twice.empty()) return Status::Invalid(file + ": has the field " + twice + " twice");
  if (!out->is_object()) return Status::Invalid(file + ": must be a JSON object, but is " + Show(*out));
  return {};
}

std::string Show(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "..";
  return text;
}

std::string Show(double value) {
  if (std::isnan(value)) return "nan";
  char text[32];
  const bool plain = value == std::floor(value) && std::fabs(value) < 1e6;  // 500000, not 5e+05
  const auto end = plain ? std::to_chars(text, text + sizeof text, static_cast<int64_t>(value))
                         : std::to_chars(text, text + sizeof text, value);
  return {text, end.ptr};
}

namespace {

bool ReadNumber(const Json& value, double low, double high, double* out) {
  if (!value.is_number()) return false;
  *out = value.get<double>();
  return std::isfinite(*out) && *out >= low && *out <= high;
}

bool ReadInteger(const Json& value, int64_t low, int64_t high, int64_t* out) {
  double number = 0;  // 4096.0 is an integer too, as in Python's own output
  constexpr double kExact = 9007199254740992.0;
  if (!ReadNumber(value, -kExact, kExact, &number) || number != std::floor(number)) return false;
  *out = static_cast<int64_t>(number);
  return *out >= low && *out <= high;
}

std::string Range(const std::string& low, const std::string& high) { return " from " + low + " to " + high; }

}  // namespace

const Json* Fields::Find(std::string_view key) {
  known_.emplace(key);
  const auto at = object_.find(std::string(key));
  return at == object_.end() || at->is_null() ? nullptr : &*at;
}

Status Fields::Number(std::string_view key, double low, double high, std::optional<double>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  double number = 0;
  if (!ReadNumber(*value, low, high, &number)) {
    return Status::Invalid(Name(key) + " must be a number" + Range(Show(low), Show(high)) + ", but is " + Show(*value));
  }
  *out = number;
  return {};
}

Status Fields::Integer(std::string_view key, int64_t low, int64_t high, std::optional<int64_t>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  int64_t number = 0;
  if (!ReadInteger(*value, low, high, &number)) {
    return Status::Invalid(Name(key) + " must be an integer" + Range(std::to_string(low), std::to_string(high)) +
                           ", but is " + Show(*value));
  }
  *out = number;
  return {};
}

Status Fields::Boolean(std::string_view key, std::optional<bool>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_boolean()) return Status::Invalid(Name(key) + " must be true or false, but is " + Show(*value));
  *out = value->get<bool>();
  return {};
}

Status Fields::Text(std::string_view key, std::optional<std::string>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_string()) return Status::Invalid(Name(key) + " must be a string, but is " + Show(*value));
  *out = value->get<std::string>();
  return {};
}

Status Fields::Numbers(std::string_view key, double low, double high, std::optional<std::vector<double>>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return Status::Invalid(Name(key) + " must be an array of numbers, but is " + Show(*value));
  std::vector<double> numbers(value->size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (!ReadNumber((*value)[i], low, high, &numbers[i])) {
      return Status::Invalid(Name(key) + "[" + std::to_string(i) + "] must be a number" + Range(Show(low), Show(high)) +
                             ", but is " + Show((*value)[i]));
    }
  }
  *out = std::move(numbers);
  return {};
}

Status Fields::Integers(std::string_view key, int64_t low, int64_t high, std::optional<std::vector<int64_t>>* out) {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return Status::Invalid(Name(key) + " must be an array of integers, but is " + Show(*value));
  std::vector<int64_t> numbers(value->size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (!ReadInteger((*value)[i], low, high, &numbers[i])) {
      return Status::Invalid(Name(key) + "[" + std::to_string(i) + "] must be an integer" +
                             Range(std::to_string(low), std::to_string(high)) + ", but is " + Show((*value)[i]));
    }
  }
  *out = std::move(numbers);
  return {};
}

Status Fields::RefuseOthers(std::string_view owner) const {
  for (const auto& [key, value] : object_.items()) {
    if (value.is_null() || key.starts_with("_") || known_.count(key) != 0) continue;
    const std::string shown = Show(Json(key));  // quoted and escaped
    return Status::Invalid(where_ + (shown.ends_with('"') ? shown.substr(1, shown.size() - 2) : shown.substr(1)) +
                           " is not a field that " + std::string(owner) + " knows");
  }
  return {};
}

}  // namespace ropewalk
