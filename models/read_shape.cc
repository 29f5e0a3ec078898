// The shape of a model's attention (read_rule.h).
// SPDX-License-Identifier: Apache-2.0
#include "models/read_rule.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "models/model_fields.h"

namespace ropewalk {
namespace {

// The first of several spellings of an integer.
Status FirstInteger(Fields* fields, std::initializer_list<std::string_view> keys, int64_t low, int64_t high,
                    std::optional<int64_t>* out, std::string* name = nullptr) {
  for (const std::string_view key : keys) {
    ROPEWALK_TRY(fields->Integer(key, low, high, out));
    if (*out) {
      if (name != nullptr) *name = key;
      return {};
    }
  }
  return {};
}

}  // namespace

Status ReadShape(Fields* fields, const ModelTraits& traits, ModelConfig* config, Surroundings* around) {
  std::optional<int64_t> q_heads, k_heads, hidden, head_dim, rotated, not_rotated, rotary_dim, max_position;
  ROPEWALK_TRY(FirstInteger(fields, {"num_attention_heads", "n_head", "n_heads"}, 1, kMaxHeads, &q_heads));
  ROPEWALK_TRY(
      FirstInteger(fields, {"num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"}, 1, kMaxHeads, &k_heads));
  ROPEWALK_TRY(ReadOwnHeads(fields, traits.fields, &k_heads));
  ROPEWALK_TRY(FirstInteger(fields, {"hidden_size", "n_embd", "d_model"}, 1, kMaxSize, &hidden));
  ROPEWALK_TRY(FirstInteger(fields, {"head_dim", "attention_head_dim", "kv_channels"}, 1, kMaxSize, &head_dim));
  ROPEWALK_TRY(FirstInteger(fields, {"qk_rope_head_dim"}, 1, kMaxSize, &rotated));
  ROPEWALK_TRY(FirstInteger(fields, {"qk_nope_head_dim"}, 0, kMaxSize, &not_rotated));
  ROPEWALK_TRY(FirstInteger(fields, {"rotary_dim"}, 1, kMaxSize, &rotary_dim));
  ROPEWALK_TRY(FirstInteger(fields, {"max_position_embeddings", "n_positions", "max_seq_len", "seq_length"}, 1,
                            kMaxLength, &max_position));
  if (traits.q_heads != 0 && !q_heads) q_heads = traits.q_heads;
  if (traits.k_heads != 0 && !k_heads) k_heads = traits.k_heads;
  if (traits.head_dim != 0 && !head_dim) head_dim = traits.head_dim;
  if (!q_heads) return Status::Invalid(fields->Name("num_attention_heads") + " is missing");
  if (rotated) {  // MLA: the rotated part is the last of the head, and `head_dim`, if any, is that part or the whole
    if (!not_rotated) not_rotated = head_dim.value_or(*rotated) - *rotated;
    if (*not_rotated < 0) {
      return Status::Invalid(fields->Name("qk_rope_head_dim") + " is " + std::to_string(*rotated) +
                             ", more than head_dim, " + std::to_string(*head_dim));
    }
    around->head_dim = head_dim.value_or(*rotated);
    around->rotary_dim = rotated;
    around->is_mla = true;
    config->head_dim = *rotated + *not_rotated;
    config->rotary_offset = *not_rotated;
  } else {
    if (!head_dim) {
      if (!hidden) return Status::Invalid(fields->Name("head_dim") + " is missing, and so is hidden_size");
      if (*hidden % *q_heads != 0) {
        return Status::Invalid(fields->Name("hidden_size") + " is " + std::to_string(*hidden) +
                               ", not a multiple of num_attention_heads, " + std::to_string(*q_heads));
      }
      head_dim = *hidden / *q_heads;
    }
    config->head_dim = around->head_dim = *head_dim;
    if (rotary_dim && *rotary_dim > *head_dim) {
      return Status::Invalid(fields->Name("rotary_dim") + " is " + std::to_string(*rotary_dim) +
                             ", more than the head of " + std::to_string(*head_dim));
    }
    if (!traits.rotary_dim_unread) around->rotary_dim = rotary_dim;
  }
  config->q_heads = *q_heads;
  config->k_heads = k_heads.value_or(*q_heads);
  if (config->q_heads % config->k_heads != 0) {
    return Status::Invalid(fields->Name("num_attention_heads") + " is " + std::to_string(*q_heads) +
                           ", not a multiple of num_key_value_heads, " + std::to_string(*k_heads));
  }
  around->max_position = max_position;
  config->max_position = max_position.value_or(0);
  return {};
}

// A diffusion transformer: the head's pairs are split over axes, each with frequencies of its own.
Status ReadDiffusion(Fields* fields, const ModelTraits& traits, ModelConfig* config) {
  std::optional<int64_t> heads, head_dim;
  std::optional<std::vector<int64_t>> dims;
  std::optional<double> theta;
  std::string theta_name;
  ROPEWALK_TRY(FirstInteger(fields, {"num_attention_heads", "n_heads"}, 1, kMaxHeads, &heads));
  ROPEWALK_TRY(FirstInteger(fields, {"attention_head_dim"}, 1, kMaxRotaryDim, &head_dim));
  for (const char* key : {"axes_dims_rope", "axes_dim_rope", "axes_dims", "axes_dim", "rope_axes_dim"}) {
    if (!dims) ROPEWALK_TRY(fields->Integers(key, 2, kMaxRotaryDim, &dims));
  }
  ROPEWALK_TRY(FirstNumber(fields, {"rope_theta", "theta"}, 1, kMaxTheta, &theta, &theta_name));
  if (!dims && traits.axes_dims[0] != 0) {
    dims.emplace();
    for (const int dim : traits.axes_dims) {
      if (dim != 0) dims->push_back(dim);
    }
  }
  for (const auto& [key, missing] :
       {std::pair{"axes_dims_rope", !dims || dims->empty()}, std::pair{"rope_theta", !theta && traits.theta == 0}}) {
    if (!missing) continue;
    return Status::Invalid(fields->Name(key) + " is missing, and _class_name " + Quoted(config->model_type) +
                           " is not one that Ropewalk knows: give it, or " + kWayOut);
  }
  if (theta && !(*theta > 1)) return Status::Invalid(fields->Name(theta_name) + " must be greater than 1, but is 1");
  if (!heads) return Status::Invalid(fields->Name("num_attention_heads") + " is missing");
  RopeRule* rule = &config->rule;
  for (size_t axis = 0; axis < dims->size(); ++axis) {
    const int64_t dim = (*dims)[axis];
    if (dim % 2 != 0) {
      return Status::Invalid(fields->Name("axes_dims_rope") + "[" + std::to_string(axis) + "] must be even, but is " +
                             std::to_string(dim));
    }
    rule->rotary_dim += dim;
    if (rule->rotary_dim > kMaxRotaryDim) break;
    rule->axes.insert(rule->axes.end(), static_cast<size_t>(dim / 2), static_cast<int32_t>(axis));
  }
  if (!head_dim) head_dim = rule->rotary_dim;
  if (rule->rotary_dim > *head_dim || rule->rotary_dim > kMaxRotaryDim) {
    return Status::Invalid(fields->Name("axes_dims_rope") + " sums to more than the head of " +
                           std::to_string(*head_dim));
  }
  rule->axes_dims = *dims;
  rule->theta = theta.value_or(traits.theta);
  rule->double_table = traits.double_table;
  config->q_heads = config->k_heads = *heads;
  config->head_dim = *head_dim;
  config->axes = static_cast<int>(dims->size());
  config->interleaved = traits.interleaved;
  config->norm = traits.norm != TraitNorm::kNone;
  return {};
}

}  // namespace ropewalk
