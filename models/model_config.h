// What a model's config.json says about its rotary embedding, checked and in one spelling: shapes, pairing, norm, layer
// types, and the rule of its frequencies. The field names are those of Hugging Face.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "frequencies/frequencies.h"

namespace ropewalk {

// At one layer type.
struct ModelConfig {
  std::string name;        // "_name_or_path", or the file's stem
  std::string model_type;  // "qwen3", "flux", ..
  bool known = false;      // the model type: then what its code fixes (pairing, norm) is known, too
  int64_t q_heads = 0, k_heads = 0;
  int64_t head_dim = 0;  // of a whole head (DeepSeek-V3: qk_nope_head_dim + qk_rope_head_dim)
  int64_t rotary_offset = 0;
  int64_t max_position = 0;
  bool interleaved = false;  // pairing
  bool norm = false;         // per-head RMSNorm of q and k before the rotation
  bool zero_centered_weight = false;
  double eps = 1e-6;
  int axes = 1;                          // rows of positions: 1, or 3 for mrope, Flux and Qwen-Image
  std::vector<std::string> layer_types;  // those that have frequencies; empty: one rule for all layers
  RopeRule rule;
};

// Any configuration that gives frequencies. `layer_type` is empty or one of theirs; with `any_layer_type` an empty one
// means the first that has frequencies.
Status ReadLayerConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                       int64_t sequence_length, bool any_layer_type, ModelConfig* out);
// `name` is what messages call the text (its path). A model_type that is not in the table is refused, as its pairing
// and norm are unknown.
Status ReadModelConfig(std::string_view json, std::string_view name, ModelConfig* out);

// Frequencies by a scaling text, or by a config.json.
// `scaling_json` may be empty. Messages call its fields "scaling.factor".
Status MakeFrequencies(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                       ropewalk_frequencies** out);
// `layer_type` is empty or one of ModelConfig::layer_types.
Status FrequenciesFromConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                             int64_t sequence_length, ropewalk_frequencies** out);

}  // namespace ropewalk
