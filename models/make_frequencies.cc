// SPDX-License-Identifier: Apache-2.0
#include "models/make_frequencies.h"

#include "frequencies/frequencies.h"
#include "models/model_config.h"
#include "models/read_rule.h"

namespace ropewalk {

Status MakeFrequencies(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                       ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    RopeRule rule;
    ROPEWALK_TRY(ReadScaling(theta, rotary_dim, scaling_json, sequence_length, &rule));
    return FrequenciesFromRule(rule, out);
  });
}

Status FrequenciesFromConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                             int64_t sequence_length, ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    ModelConfig config;
    ROPEWALK_TRY(ReadLayerConfig(json, name, layer_type, sequence_length, /*any_layer_type=*/false, &config));
    return FrequenciesFromRule(config.rule, out);
  });
}

}  // namespace ropewalk
