// The shape of a model's attention: heads, their size, what of them is rotated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/status.h"
#include "models/json_fields.h"
#include "models/model_config.h"
#include "models/model_traits.h"
#include "models/read_rule.h"

namespace ropewalk {

Status ReadShape(Fields* fields, const ModelTraits& traits, ModelConfig* config, Surroundings* around);
// Of a diffusion transformer's configuration, and its rule, which is a number of frequencies for each axis.
Status ReadDiffusion(Fields* fields, const ModelTraits& traits, ModelConfig* config);

}  // namespace ropewalk
