// What a model's code fixes and its config.json does not say: the pairing, the norm, defaults of absent fields. Read
// from the modeling and configuration files of transformers 5.23 and diffusers 0.42.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

namespace ropewalk {

enum class TraitNorm { kNone, kRms, kRmsZeroCentered };
// What a model's configuration has that no other's has, or means otherwise: read for that model alone.
enum class TraitFields {
  kNone,
  kChatglm,        // rope_ratio stretches theta; heads of k by multi_query_group_num
  kDbrx,           // theta and heads of k stand in attn_config
  kDeepseekV4,     // compress_rope_theta, and the scaling rule, for layers that compress
  kErnie,          // compression_ratio divides positions
  kFalcon,         // one head of k with multi_query
  kMistralParams,  // a params.json instead of a config.json, with an object yarn
  kMolmo2,         // rope_scaling_layers
  kPhi3Small,      // rope_embedding_base, rope_position_scale
  kQwen,           // use_dynamic_ntk from seq_length on
  kLayerTheta,     // layer_rope_theta, a theta for each layer, or 0 for none
};
// Which rules of its configuration a model's code goes by.
enum class TraitRule {
  kAny,        // none is the default rotation
  kGiven,      // none is a rule that only the code has
  kNested,     // likewise, and only those by layer type
  kNoScaling,  // rope_parameters alone: rope_scaling is passed over
  kNone,       // rope_theta alone
};
enum class TraitMrope {
  kContiguous,   // time, height, width (Qwen2-VL)
  kInterleaved,  // thw thw .. t (Qwen3-VL)
  kErnie,        // hw hw .. t
  kUnsupported
};

struct ModelTraits {
  std::string_view model_type;      // or the _class_name of a diffusion transformer
  std::string_view refused = {};    // why it cannot be served: "a model with ALiBi, without rotary embedding"
  std::string_view rotary_if = {};  // the field without which such a model has no rotary embedding either
  TraitFields fields = TraitFields::kNone;
  TraitRule rule = TraitRule::kAny;
  bool frequencies_only = false;    // pairing and norm are not told here
  std::string_view theta_key = {};  // the one key, besides rope_parameters, that gives theta
  bool rotary_dim_unread = false;   // by its code; the configuration must agree
  bool part_read = false;           // partial_rotary_factor, by its default rotation; or its code is not transformers'
  bool interleaved = false;
  TraitNorm norm = TraitNorm::kNone;  // per head, before the rotation
  bool norm_if_asked = false;         // only with use_qk_norm: true
  double theta = 10000;               // of configurations that do not say; 0: they must
  double local_theta = 0;             // of sliding layers, where the model has two
  bool sliding_plain = false;         // one rope_parameters for all is, scaling and all, that of full attention alone
  double partial = 0;                 // partial_rotary_factor of configurations that do not say; 0: 1; -1: they must
  TraitMrope mrope = TraitMrope::kContiguous;
  int q_heads = 0, k_heads = 0, head_dim = 0;  // of configurations that do not say; 0: they must
  std::array<int, 4> axes_dims{};              // diffusion, likewise
  bool double_table = false;
};

// Stands for the model type that Mistral's own params.json does not give.
inline constexpr std::string_view kMistralParams = "params.json of Mistral";

// The traits of a model type; null for one that is not listed.
const ModelTraits* FindTraits(std::string_view model_type);
// All of them.
std::span<const ModelTraits> AllTraits();

}  // namespace ropewalk
