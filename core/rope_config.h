// What a scaling text or a model's config.json says about rotary embedding, checked and in one spelling: the maths is
// in frequencies.cc. The field names are those of Hugging Face.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace ropewalk {

constexpr int64_t kMaxRotaryDim = 8192;

enum class RopeType { kDefault, kLinear, kDynamic, kYarn, kLongrope, kLlama3, kProportional };

// Everything that decides the frequencies. One of these for each layer type.
struct RopeRule {
  RopeType type = RopeType::kDefault;
  double theta = 0;
  int64_t rotary_dim = 0;                // twice the number of frequencies
  double partial = 1;                    // proportional: this part of the frequencies turns, the others are zero
  double factor = 1;                     // linear, dynamic, yarn, llama3, proportional
  double alpha = 0;                      // dynamic with a fixed alpha (HunYuan); 0: none
  int64_t max_position = 0;              // dynamic
  int64_t original_position = 0;         // yarn, llama3: the length that the model was first trained on
  int64_t sequence_length = 0;           // dynamic; 0: max_position
  double beta_fast = 32, beta_slow = 1;  // yarn
  bool truncate = true;                  // yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  std::vector<double> divisors;                      // longrope: the short or the long factors, already chosen
  double attention_scaling = 1;
  std::vector<int32_t> axes;       // the row of positions each pair takes; empty: one row
  std::vector<int64_t> axes_dims;  // diffusion: frequencies of each axis on its own, one after the other
  bool double_table = false;       // diffusion: its own table is made in double, not in float32
  std::string warnings;            // fields that were ignored, a sentence a line
};

// A model as its config.json describes it, at one layer type.
struct RopeConfig {
  std::string model_type, name;
  bool known = false;  // the model type: then what its code fixes (pairing, norm) is known, too
  int64_t q_heads = 0, k_heads = 0, head_dim = 0, rotary_offset = 0, max_position = 0;
  bool interleaved = false, norm = false, zero_centered_weight = false;
  double eps = 1e-6;
  int axes = 1;
  std::vector<std::string> layer_types;  // the keys that have frequencies; empty: one rule for all layers
  RopeRule rule;
};

// `scaling_json` may be empty. Messages call its fields "scaling.factor".
Status ReadScaling(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                   RopeRule* out);

// `layer_type` is empty or a key; with `any_layer_type` an empty one means the first that has frequencies.
Status ReadRopeConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                      int64_t sequence_length, bool any_layer_type, RopeConfig* out);

}  // namespace ropewalk
