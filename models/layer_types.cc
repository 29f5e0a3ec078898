// Which rule serves a layer type, where a configuration has more than one.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>

#include "base/fork.h"
#include "base/text.h"
#include "models/model_fields.h"
#include "models/read_rule.h"

namespace ropewalk {
namespace {

constexpr double kDeepseekV4CompressTheta = 160000;

const Json* MakeEmpty() { return new Json(Json::object()); }

}  // namespace

Status ReadChoices(Fields* fields, const ModelTraits& traits, const Surroundings& around,
                   const std::set<std::string>& layer_types, Json* made, std::vector<Choice>* choices) {
  const Json& empty = OnceMade<Json, MakeEmpty>::Get();
  const Json *new_spelling = nullptr, *old_spelling = nullptr;
  ROPEWALK_TRY(Inner(fields, "rope_parameters", &new_spelling));
  ROPEWALK_TRY(Inner(fields, "rope_scaling", &old_spelling));
  if (traits.fields == TraitFields::kMistralParams) {
    const Json* yarn = nullptr;
    ROPEWALK_TRY(Inner(fields, "yarn", &yarn));
    if (yarn != nullptr) {
      ROPEWALK_TRY(ReadMistralYarn(*yarn, fields->Name("yarn."), made));
      choices->push_back({"", made, fields->Name("yarn."), true, {}, around.default_theta});
      return {};
    }
  }
  if (new_spelling != nullptr && old_spelling != nullptr && *new_spelling != *old_spelling && !old_spelling->empty()) {
    return Status::Invalid(fields->Name("rope_scaling") + " and rope_parameters are both there and differ");
  }
  const bool use_new = new_spelling != nullptr;
  const Json* object = use_new ? new_spelling : old_spelling != nullptr ? old_spelling : &empty;
  const std::string where = fields->Name(use_new || old_spelling == nullptr ? "rope_parameters" : "rope_scaling");
  const double default_theta = around.default_theta;

  std::optional<double> local_theta, global_theta;
  std::string local_name, global_name;
  ROPEWALK_TRY(
      FirstNumber(fields, {"rope_local_base_freq", "local_rope_theta"}, 1, kMaxTheta, &local_theta, &local_name));
  if (local_theta || traits.local_theta != 0) {
    ROPEWALK_TRY(FirstNumber(fields, {"global_rope_theta"}, 1, kMaxTheta, &global_theta, &global_name));
  }

  if (traits.rule == TraitRule::kNoScaling && old_spelling != nullptr && !old_spelling->empty()) {
    return Status::Invalid(fields->Name("rope_scaling") + " is not read by the code of model_type " +
                           Quoted(traits.model_type) + ": give rope_parameters instead");
  }
  const bool nested = std::any_of(object->begin(), object->end(), [](const Json& value) { return value.is_object(); });
  // transformers passes over one for all layers where the model has two thetas.
  const bool by_layer = traits.rule == TraitRule::kNested ||
                        (use_new && !object->empty() && traits.local_theta != 0 && !traits.sliding_plain);
  if (!nested && (by_layer || (traits.rule == TraitRule::kGiven && object->empty()))) {
    return Status::Invalid(where + (object->empty() ? " is missing" : " is one for all layers") + ", but model_type " +
                           Quoted(traits.model_type) + " needs " + (by_layer ? "one for each layer type" : "it") +
                           ": give it, or " + kWayOut);
  }
  std::optional<double> compress_theta;
  if (traits.fields == TraitFields::kDeepseekV4) {
    ROPEWALK_TRY(fields->Number("compress_rope_theta", 1, kMaxTheta, &compress_theta));
  }
  if (nested) {
    for (const std::string& layer_type : layer_types) {  // those that attend and rotate; null says that they do not
      const bool attends = layer_type.ends_with("_attention") && layer_type != "linear_attention";
      if (attends && traits.fields != TraitFields::kDeepseekV4 && !object->contains(layer_type)) {
        return Status::Invalid(where + " has nothing for " + Quoted(layer_type) +
                               ", of which layer_types has layers: give it, or null if they do not rotate");
      }
    }
    for (const auto& [key, value] : object->items()) {
      const std::string inner = Text(where, ".", key);
      if (!value.is_object() && !value.is_null()) {
        return Status::Invalid(inner + " stands next to layer types and must be an object, but is " + Show(value));
      }
      // Serialised by transformers, a layer without rotary embedding is null.
      const bool inherits = value.is_null() || !value.contains("rope_theta") || value["rope_theta"].is_null();
      choices->push_back({key, value.is_null() ? nullptr : &value, inner + ".", inherits, {}, default_theta});
      if (local_theta && key == "sliding_attention") {  // said twice
        choices->back().inherits_theta = false;
        choices->back().theta = local_theta;
        choices->back().theta_name = local_name;
      }
    }
  } else if (traits.fields == TraitFields::kDeepseekV4) {
    // The layers that compress have a theta and the rule, but none of yarn's scaling of the attention, unless asked.
    *made = *object;
    const auto type = made->find(made->contains("rope_type") ? "rope_type" : "type");
    if (type != made->end() && *type == "yarn" && !made->contains("attention_factor")) {
      (*made)["attention_factor"] = 1.0;
    }
    made->erase("rope_theta");  // of the other layers
    choices->push_back({"main", &empty, where + ".", true, {}, default_theta});
    choices->push_back({"compress", made, where + ".", false, compress_theta, kDeepseekV4CompressTheta});
  } else if (traits.sliding_plain && use_new) {
    // transformers passes it over; what was meant (vLLM): the rule for full attention alone, theta for both.
    if (const auto theta = object->find("rope_theta"); theta != object->end()) (*made)["rope_theta"] = *theta;
    choices->push_back({"full_attention", object, where + ".", true, {}, default_theta});
    choices->push_back({"sliding_attention", made, where + ".", true, {}, default_theta});
  } else if (local_theta || traits.local_theta != 0) {
    choices->push_back({"full_attention", object, where + ".", !global_theta, global_theta, default_theta});
    choices->push_back({"sliding_attention", &empty, where + ".", false, local_theta,
                        traits.local_theta != 0 ? traits.local_theta : default_theta});
  } else {
    choices->push_back({"", object, where + ".", true, {}, default_theta});
    for (const auto& [key, value] : object->items()) {
      if (value.is_null() && layer_types.count(key) != 0) choices->push_back({key, nullptr, where + ".", true, {}, 0});
    }
  }
  return {};
}

Status Choose(const std::vector<Choice>& choices, const std::set<std::string>& layer_types, std::string_view prefix,
              std::string_view layer_type, bool any, const Choice** out) {
  std::vector<std::string> names;
  for (const Choice& choice : choices) {
    if (!choice.layer_type.empty() && choice.object != nullptr) names.push_back(choice.layer_type);
  }
  std::string file(prefix);  // "config.json", "config.json: text_config"
  file.resize(file.size() - (file.ends_with(".") ? 1 : 2));
  if (names == std::vector<std::string>{"main", "compress"}) {  // DeepSeek-V4's kinds of rotation, and who has them
    if (layer_type == "sliding_attention") layer_type = "main";
    if (layer_type == "compressed_sparse_attention" || layer_type == "heavily_compressed_attention") {
      layer_type = "compress";
    }
  }
  for (const Choice& choice : choices) {
    if (!layer_type.empty() && choice.layer_type == layer_type) {
      if (choice.object == nullptr) {
        return Status::Invalid(file + ": layers of type " + Quoted(layer_type) + " have no rotary embedding");
      }
      *out = &choice;
      return {};
    }
  }
  const Choice& first = choices.front();
  const bool flat = first.layer_type.empty();
  if (!layer_type.empty()) {
    if (flat && layer_types.count(std::string(layer_type)) != 0) {
      *out = &first;
      return {};
    }
    if (names.empty()) names.assign(layer_types.begin(), layer_types.end());
    return Status::Invalid("layer_type is " + Quoted(layer_type) + ", but " + file +
                           (names.empty() ? " has no layer types" : " has " + AnyOf(names)));
  }
  for (const Choice& choice : choices) {
    if (choice.object == nullptr) continue;
    if (*out == nullptr) *out = &choice;
    if (*choice.object == *(*out)->object && choice.theta == (*out)->theta &&
        choice.default_theta == (*out)->default_theta) {
      continue;
    }
    if (any) continue;
    return Status::Invalid("layer_type is missing, but " + file + " has different rotary embeddings for " +
                           AnyOf(names));
  }
  if (*out == nullptr) return Status::Invalid(file + ": no layer type has a rotary embedding");
  return {};
}

// Gemma4 as transformers serialises it: `per_layer_config` has an entry, by the layer's number ("05"), for those layers
// that differ; the first one of `layer_type` tells.
Status ReadOverride(Fields* fields, const std::vector<std::string>& layer_list, std::string_view layer_type,
                    std::optional<int64_t>* head_dim) {
  const Json* overrides = nullptr;
  ROPEWALK_TRY(Inner(fields, "per_layer_config", &overrides));
  if (overrides == nullptr) return {};
  for (const auto& [key, value] : overrides->items()) {
    size_t layer = 0;
    const auto parsed = std::from_chars(key.data(), key.data() + key.size(), layer);
    const bool matches = parsed.ec == std::errc() && layer < layer_list.size() && layer_list[layer] == layer_type;
    if (!matches || !value.is_object()) continue;
    Fields inner(value, fields->Name("per_layer_config.") + key + ".");
    return inner.Integer("head_dim", 1, kMaxSize, head_dim);
  }
  return {};
}

Status ReadLayerTypes(Fields* fields, std::vector<std::string>* of_each_layer) {
  const Json* list = fields->Find("layer_types");
  if (list == nullptr) return {};
  if (!list->is_array()) {
    return Status::Invalid(fields->Name("layer_types") + " must be an array, but is " + Show(*list));
  }
  for (const Json& entry : *list) {
    if (!entry.is_string()) {
      return Status::Invalid(fields->Name("layer_types") + " must hold strings, but holds " + Show(entry));
    }
    of_each_layer->push_back(entry.get<std::string>());
  }
  return {};
}

}  // namespace ropewalk
