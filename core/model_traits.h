// What a model's code fixes and its config.json does not say: the pairing, the norm, defaults of absent fields. Read
// from the modeling and configuration files of transformers 5.23 and diffusers 0.42.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace ropewalk {

enum class TraitNorm { kNone, kRms, kRmsZeroCentered };
enum class TraitMrope {
  kContiguous,   // time, height, width (Qwen2-VL)
  kInterleaved,  // thw thw .. t (Qwen3-VL)
  kErnie,        // hw hw .. t
  kUnsupported
};

struct ModelTraits {
  std::string_view model_type;  // or the _class_name of a diffusion transformer
  bool interleaved = false;
  TraitNorm norm = TraitNorm::kNone;  // per head, before the rotation
  bool norm_if_asked = false;         // only with use_qk_norm: true
  double theta = 0;                   // of configurations that do not say; 0: transformers' own default, 10000
  double local_theta = 0;             // of sliding layers, where the model has two
  double partial = 0;                 // partial_rotary_factor of configurations that do not say; 0: 1
  TraitMrope mrope = TraitMrope::kContiguous;
  int q_heads = 0, k_heads = 0, head_dim = 0;  // of configurations that do not say; 0: they must
  std::array<int, 4> axes_dims{};              // diffusion, likewise
  bool double_table = false;
};

// The traits of a model type; those of a plain model for one that is not listed.
const ModelTraits& TraitsOf(std::string_view model_type);

}  // namespace ropewalk
