// Scaling rules: one rope_parameters (rope_scaling) object, in every spelling, old and new, to a RopeRule; and which of
// several such objects serves a layer type.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "frequencies/frequencies.h"
#include "models/json_fields.h"
#include "models/model_config.h"
#include "models/model_fields.h"
#include "models/model_traits.h"

namespace ropewalk {

// "a", "b" or "c".
template <class Range>
std::string AnyOf(const Range& names) {
  std::string text;
  size_t left = names.size();
  for (const auto& name : names) {
    text += Quoted(name);
    --left;
    if (left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

// One value that may stand in several places: they must agree. A place is its name in messages and its value.
template <class Value>
Status Agree(std::initializer_list<std::pair<std::string, std::optional<Value>>> places, std::optional<Value>* out) {
  const std::string* first = nullptr;
  for (const auto& [name, value] : places) {
    if (!value) continue;
    if (first == nullptr) {
      first = &name;
      *out = value;
    } else if (*value != **out) {
      return Status::Invalid(*first + " is " + Show(static_cast<double>(**out)) + ", but " + name + " is " +
                             Show(static_cast<double>(*value)));
    }
  }
  return {};
}

// What stands around a rope_parameters object and decides with it.
struct Surroundings {
  std::string prefix;                    // of messages: "config.json: "
  std::optional<double> theta, partial;  // of the configuration itself
  std::string theta_name = "rope_theta", partial_name = "partial_rotary_factor";
  double default_theta = 0, default_partial = 1;  // 0: theta must be given
  std::optional<int64_t> max_position, original_position;
  int64_t head_dim = 0;               // before `partial` is applied
  std::optional<int64_t> rotary_dim;  // given outright
  bool is_mla = false;                // as qk_rope_head_dim
  int64_t sequence_length = 0;
  TraitMrope mrope = TraitMrope::kContiguous;
  std::string_view model_type;
  bool known = false;        // the model_type
  bool turns_whole = false;  // so does or may its default rotation, whatever partial_rotary_factor says
  bool by_layer = false;     // rope_parameters are by layer type
};

Status MissingTheta(const Surroundings& around);
// `where` stands before the fields' names in messages.
Status ReadRule(const Json& object, const std::string& where, const Surroundings& around, RopeRule* rule);
// A scaling text, which may be empty. Messages call its fields "scaling.factor".
Status ReadScaling(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                   RopeRule* out);

// The shape of a model's attention: heads, their size, what of them is rotated.
Status ReadShape(Fields* fields, const ModelTraits& traits, ModelConfig* config, Surroundings* around);
// Of a diffusion transformer's configuration, and its rule, which is a number of frequencies for each axis.
Status ReadDiffusion(Fields* fields, const ModelTraits& traits, ModelConfig* config);

// Which object of rope parameters serves a layer type. `object` null: this layer type has no rotary embedding.
struct Choice {
  std::string layer_type;
  const Json* object;
  std::string where;
  bool inherits_theta;          // that of the configuration applies; else:
  std::optional<double> theta;  // Gemma3's rope_local_base_freq
  double default_theta;
  std::string theta_name = "rope_theta";
};

// The type of each layer, if the configuration lists them.
Status ReadLayerTypes(Fields* fields, std::vector<std::string>* of_each_layer);
// `made` holds a rule that is written down nowhere in the configuration.
Status ReadChoices(Fields* fields, const ModelTraits& traits, const Surroundings& around,
                   const std::set<std::string>& layer_types, Json* made, std::vector<Choice>* choices);
// `layer_type` is empty or one of theirs; with `any_layer_type` an empty one means the first that has frequencies.
Status Choose(const std::vector<Choice>& choices, const std::set<std::string>& layer_types, std::string_view prefix,
              std::string_view layer_type, bool any_layer_type, const Choice** out);
// The size of heads where that of a layer type is its own.
Status ReadOverride(Fields* fields, const std::vector<std::string>& layer_list, std::string_view layer_type,
                    std::optional<int64_t>* head_dim);

}  // namespace ropewalk
