// The checks behind json_fields.h.
// SPDX-License-Identifier: Apache-2.0
#include "models/json_fields.h"

#include <charconv>
#include <cmath>

namespace ropewalk {
namespace {

constexpr int kMaxDepth = 64;
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

// Without allocating. As deep as the value nests.
void Clear(Json* value) {
  if (value->is_array()) {
    auto& elements = value->get_ref<Json::array_t&>();
    for (Json& element : elements) Clear(&element);
    elements.clear();
  } else if (value->is_object()) {
    auto& members = value->get_ref<Json::object_t&>();
    for (auto& member : members) Clear(&member.second);
    members.clear();
  }
}

// Puts each value where it belongs at once, so that what there is can be cleared whenever memory runs out.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  explicit Builder(Json* root) : next_(root) {}

  std::string twice;  // the first field that an object has twice
  std::string error;  // what is wrong with the text

  bool null() override { return Put(nullptr); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_unsigned(number_unsigned_t value) override { return Put(value); }
  bool number_float(number_float_t value, const string_t&) override { return Put(value); }
  bool string(string_t& value) override { return Put(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // JSON has none
  bool start_object(size_t) override { return Open(Json::value_t::object); }
  bool start_array(size_t) override { return Open(Json::value_t::array); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    const auto [member, added] = open_.back()->get_ref<Json::object_t&>().try_emplace(name, nullptr);
    if (!added && twice.empty()) twice = Show(Json(name));
    if (!added) Clear(&member->second);
    next_ = &member->second;
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& exception) override {
    error = exception.what();
    return false;
  }

 private:
  Json* Place() {  // of the next value
    if (open_.empty() || !open_.back()->is_array()) return next_;
    auto& elements = open_.back()->get_ref<Json::array_t&>();
    elements.emplace_back();
    return &elements.back();
  }
  template <class Value>
  bool Put(Value&& value) {
    *Place() = Json(std::forward<Value>(value));
    return true;
  }
  bool Open(Json::value_t type) {
    Json* const place = Place();
    *place = Json(type);
    open_.push_back(place);
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  Json* next_;  // the root, or the member that the last key made
  std::vector<Json*> open_;
};

}  // namespace

OwnedJson::~OwnedJson() { Clear(this); }  // NOLINT(bugprone-exception-escape): as the header says

Status ParseJsonObject(std::string_view text, std::string_view name, OwnedJson* out) {
  const std::string file(name);
  if (text.size() > kMostJsonBytes) {
    return Status::Invalid(file + ": is larger than " + std::to_string(kMostJsonBytes >> 20) + " MiB");
  }
  if (NestsTooDeep(text)) return Status::Invalid(file + ": nests deeper than 64 levels");
  Builder builder(out);
  if (!Json::sax_parse(QuoteBareWords(text), &builder)) {
    const std::string& what = builder.error;  // "[json.exception.parse_error.101] parse error at line 1, .."
    const size_t end = what.find("] ");
    std::string detail = end == std::string::npos ? what : what.substr(end + 2);
    if (detail.size() > 200) detail = detail.substr(0, 200) + "..";
    return Status::Invalid(file + ": is not JSON: " + detail);
  }
  if (!builder.twice.empty()) return Status::Invalid(file + ": has the field " + builder.twice + " twice");
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

std::string ShowKey(std::string_view key) {
  const std::string shown = Show(Json(std::string(key)));
  return shown.ends_with('"') ? shown.substr(1, shown.size() - 2) : shown.substr(1);
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
    return Status::Invalid(where_ + ShowKey(key) + " is not a field that " + std::string(owner) + " knows");
  }
  return {};
}

}  // namespace ropewalk
