// Frequencies by a scaling text, or by a model's config.json. The field names are those of Hugging Face; the maths is
// in frequencies/frequencies.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <string_view>

#include "base/status.h"

namespace ropewalk {

// `scaling_json` may be empty. Messages call its fields "scaling.factor".
Status MakeFrequencies(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                       ropewalk_frequencies** out);
// `layer_type` is empty or one of ModelConfig::layer_types.
Status FrequenciesFromConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                             int64_t sequence_length, ropewalk_frequencies** out);

}  // namespace ropewalk
