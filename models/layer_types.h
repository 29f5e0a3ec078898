// Which rule serves a layer type, where a configuration has more than one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "models/json_fields.h"
#include "models/model_traits.h"
#include "models/read_rule.h"

namespace ropewalk {

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
