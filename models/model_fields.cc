// The fields behind model_fields.h: what the code of single models reads, as published.
// SPDX-License-Identifier: Apache-2.0
#include "models/model_fields.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

namespace ropewalk {
namespace {

// Words of keys that change the rotation in some model's code. Such a key that nobody has read is refused.
constexpr std::string_view kRotaryWords[] = {"rope", "rotary", "ntk", "yarn", "alibi", "position_embedding",
                                             "swa",  "theta"};
// Keys with such a word that say which layers rotate, or are of another part of the model.
constexpr std::string_view kNotOfTheRotation[] = {"no_rope_layers", "no_rope_layer_interval",
                                                  "max_position_embeddings"};

bool Contains(std::string_view key, std::string_view word) {
  const auto equal = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; };
  return std::search(key.begin(), key.end(), word.begin(), word.end(), equal) != key.end();
}

// Whether nothing can follow from a field: absent, switched off, empty.
bool SaysNothing(const Json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) || (value.is_structured() && value.empty());
}

// A part of the configuration that is a model of its own, or of what is seen and heard.
bool IsOtherModel(std::string_view key, const Json& value) {
  const auto type = value.find("model_type");
  if (type != value.end() && type->is_string() && !type->get<std::string>().empty()) return true;
  for (const std::string_view word : {"vision", "visual", "image", "audio", "speech", "quantization"}) {
    if (Contains(key, word)) return true;
  }
  return false;
}

}  // namespace

std::string Quoted(std::string_view text) { return Show(Json(std::string(text))); }

Status Missing(const Fields& fields, std::string_view key, std::string_view type) {
  return Status::Invalid(fields.Name(key) + " is missing, but rope_type " + Quoted(type) + " needs it");
}

Status Inner(Fields* fields, std::string_view key, const Json** out) {
  *out = fields->Find(key);
  if (*out != nullptr && !(*out)->is_object()) {
    return Status::Invalid(fields->Name(key) + " must be an object, but is " + Show(**out));
  }
  return {};
}

Status FirstNumber(Fields* fields, std::initializer_list<std::string_view> keys, double low, double high,
                   std::optional<double>* out, std::string* name) {
  for (const std::string_view key : keys) {
    ROPEWALK_TRY(fields->Number(key, low, high, out));
    if (*out) {
      *name = key;
      return {};
    }
  }
  return {};
}

bool ThetaIsTooLarge(const RopeRule& rule, double ratio) {
  const auto dim = static_cast<double>(rule.rotary_dim);
  return !(rule.theta * std::pow(ratio, dim / (dim - 2)) < 1e30);
}

Status CheckIsRotary(Fields* fields, const ModelTraits& traits) {
  if (!traits.refused.empty()) {
    return Status::Invalid(fields->Name("model_type") + " is " + Quoted(traits.model_type) + ", " +
                           std::string(traits.refused));
  }
  const auto refuse = [](const std::string& name, const std::string& value, const char* what) {
    return Status::Invalid(name + " is " + value + ": a model with " + what + " has no rotary embedding");
  };
  // Also in the part that MPT and DBRX have for the attention.
  const auto attention = fields->object().find("attn_config");
  const bool has_attention = attention != fields->object().end() && attention->is_object();
  for (const auto& [key, what] : {std::pair{"alibi", "ALiBi"},
                                  {"use_alibi", "ALiBi"},
                                  {"nope", "NoPE"},
                                  {"use_nope", "NoPE"},
                                  {"mla_use_nope", "NoPE"}}) {
    for (const bool inside : {false, true}) {
      const Json& object = inside && has_attention ? *attention : fields->object();
      const auto value = object.find(key);
      if (value == object.end() || !value->is_boolean() || !value->get<bool>()) continue;
      return refuse(fields->Name(inside ? "attn_config." : "") + key, "true", what);
    }
  }
  for (const char* key : {"position_embedding_type", "position_embeddings_type", "pos_embedding_type",
                          "positional_embedding_type", "position_encoding_type"}) {
    const auto value = fields->object().find(key);
    if (value == fields->object().end() || !value->is_string()) continue;
    fields->Ignore(key);
    const auto text = value->get<std::string>();  // "rope", "rope_gptj", "rotary"; else "absolute", "nope", ..
    if (Contains(text, "rope") || Contains(text, "rotary")) continue;
    return refuse(fields->Name(key), Quoted(text), "such positions");
  }
  for (const char* key : {"rotary", "rope", "use_rope", "use_rotary", "use_rotary_embedding", "use_rotary_embeddings",
                          "use_rotary_position_embeddings", "use_rotary_pos_emb", "use_mem_rope"}) {
    const auto value = fields->object().find(key);
    if (value == fields->object().end() || !value->is_boolean()) continue;
    if (!value->get<bool>())
      return Status::Invalid(fields->Name(key) + " is false: such a model has no rotary embedding");
    fields->Ignore(key);
  }
  if (!traits.rotary_if.empty() && !fields->Has(traits.rotary_if)) {
    return Status::Invalid(fields->Name(traits.rotary_if) + " is missing: without it model_type " +
                           Quoted(traits.model_type) + " has no rotary embedding");
  }
  return {};
}

Status RefuseRotaryFields(const Fields& fields, bool inside) {
  for (const auto& [key, value] : fields.object().items()) {
    if (SaysNothing(value) || key.starts_with("_") || fields.IsKnown(key)) continue;
    bool rotary = false;
    for (const std::string_view word : kRotaryWords) rotary = rotary || Contains(key, word);
    if (rotary && std::ranges::find(kNotOfTheRotation, key) == std::end(kNotOfTheRotation)) {
      return Status::Invalid(fields.where() + ShowKey(key) +
                             " is not a field that Ropewalk knows, and may change the rotation: correct it, or " +
                             kWayOut);
    }
    if (inside && value.is_object() && !IsOtherModel(key, value)) {
      std::string where = fields.where();
      if (where.size() < 200) where += ShowKey(key) + ".";
      ROPEWALK_TRY(RefuseRotaryFields(Fields(value, std::move(where)), inside));
    }
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// Fields of one model alone

Status ReadOwnHeads(Fields* fields, TraitFields own, std::optional<int64_t>* k_heads) {
  std::optional<bool> multi_query, new_architecture;
  if (own == TraitFields::kFalcon) {  // with multi_query one head, but of the 40B's architecture as many as it says
    ROPEWALK_TRY(fields->Boolean("multi_query", &multi_query));
    ROPEWALK_TRY(fields->Boolean("new_decoder_architecture", &new_architecture));
    if (multi_query.value_or(true) && !new_architecture.value_or(false)) *k_heads = 1;
  } else if (own == TraitFields::kChatglm) {
    ROPEWALK_TRY(fields->Boolean("multi_query_attention", &multi_query));
    if (multi_query.value_or(false)) {
      ROPEWALK_TRY(fields->Integer("multi_query_group_num", 1, kMaxHeads, k_heads));
    }
  } else if (own == TraitFields::kDbrx) {
    const Json* attention = nullptr;
    ROPEWALK_TRY(Inner(fields, "attn_config", &attention));
    if (attention != nullptr) {
      ROPEWALK_TRY(Fields(*attention, fields->Name("attn_config.")).Integer("kv_n_heads", 1, kMaxHeads, k_heads));
    }
  }
  return {};
}

Status ReadOwnTheta(Fields* fields, TraitFields own, std::optional<double>* theta, std::string* name) {
  if (own == TraitFields::kPhi3Small) {
    std::optional<double> scale;
    ROPEWALK_TRY(FirstNumber(fields, {"rope_embedding_base"}, 1, kMaxTheta, theta, name));
    ROPEWALK_TRY(fields->Number("rope_position_scale", 0, kMaxFactor, &scale));
    if (scale.value_or(1) != 1) {
      return Status::Invalid(fields->Name("rope_position_scale") + " must be 1, but is " + Show(*scale));
    }
  } else if (own == TraitFields::kChatglm) {
    std::optional<bool> two_dimensional;
    std::optional<double> ratio;
    ROPEWALK_TRY(fields->Boolean("position_encoding_2d", &two_dimensional));
    if (two_dimensional.value_or(false)) {
      return Status::Invalid(fields->Name("position_encoding_2d") +
                             " is true: the rotation of ChatGLM's first version is not supported");
    }
    ROPEWALK_TRY(fields->Number("rope_ratio", 1e-3, kMaxFactor, &ratio));
    if (ratio) {
      *theta = 10000 * *ratio;
      *name = "10000 times rope_ratio";
    }
  } else if (own == TraitFields::kDbrx) {
    const Json* attention = nullptr;
    ROPEWALK_TRY(Inner(fields, "attn_config", &attention));
    if (attention == nullptr) return {};
    ROPEWALK_TRY(Fields(*attention, fields->Name("attn_config.")).Number("rope_theta", 1, kMaxTheta, theta));
    if (*theta) *name = "attn_config.rope_theta";
  }
  return {};
}

Status ReadOwnScaling(Fields* fields, TraitFields own, int64_t sequence_length, RopeRule* rule) {
  if (own == TraitFields::kLayerTheta) {
    std::optional<std::vector<double>> thetas;
    ROPEWALK_TRY(fields->Numbers("layer_rope_theta", 0, kMaxTheta, &thetas));
    for (const double theta : thetas.value_or(std::vector<double>{})) {
      if (theta == 0 || theta == rule->theta) continue;  // 0: a layer without rotary embedding
      return Status::Invalid(fields->Name("layer_rope_theta") + " has layers of " + Show(theta) +
                             ", but rope_theta is " + Show(rule->theta) + ": " + kWayOut + " for each");
    }
  } else if (own == TraitFields::kMolmo2) {
    std::optional<std::vector<int64_t>> scaled;
    std::optional<int64_t> layers;
    ROPEWALK_TRY(fields->Integers("rope_scaling_layers", 0, kMaxSize, &scaled));
    ROPEWALK_TRY(fields->Integer("num_hidden_layers", 1, kMaxSize, &layers));
    if (scaled && rule->type != RopeType::kDefault && std::ssize(*scaled) != layers.value_or(0)) {
      return Status::Invalid(fields->Name("rope_scaling_layers") + " are not all layers: " + kWayOut + " for each");
    }
  } else if (own == TraitFields::kErnie) {
    std::optional<double> ratio;
    ROPEWALK_TRY(fields->Number("compression_ratio", 1e-6, kMaxFactor, &ratio));
    if (ratio.value_or(1) == 1) return {};
    if (rule->type != RopeType::kDefault) {
      return Status::Invalid(fields->Name("compression_ratio") + " is " + Show(*ratio) +
                             ", but rope_parameters have a rule as well");
    }
    rule->type = RopeType::kLinear;
    rule->factor = *ratio;
  } else if (own == TraitFields::kQwen) {
    std::optional<bool> dynamic;
    std::optional<int64_t> trained;
    ROPEWALK_TRY(fields->Boolean("use_dynamic_ntk", &dynamic));
    ROPEWALK_TRY(fields->Integer("seq_length", 1, kMaxLength, &trained));
    if (!dynamic.value_or(false)) return {};
    if (!trained) {
      return Status::Invalid(fields->Name("seq_length") + " is missing, but use_dynamic_ntk needs it");
    }
    if (rule->type != RopeType::kDefault || rule->rotary_dim <= 2) {
      return Status::Invalid(fields->Name("use_dynamic_ntk") +
                             " is true, but the rest is not that of model_type \"qwen\"");
    }
    if (sequence_length <= *trained) return {};
    const double longer = static_cast<double>(sequence_length) / static_cast<double>(*trained);
    rule->type = RopeType::kDynamic;
    rule->alpha = std::exp2(std::ceil(std::log2(longer) + 1)) - 1;
    if (ThetaIsTooLarge(*rule, rule->alpha)) {
      return Status::Invalid(fields->Name("seq_length") + " " + std::to_string(*trained) +
                             " is too small for a sequence of " + std::to_string(sequence_length));
    }
  }
  return {};
}

Status ReadMistralYarn(const Json& object, const std::string& where, Json* rule) {
  Fields fields(object, where);
  std::optional<double> factor, beta, alpha;
  std::optional<int64_t> original;
  std::optional<bool> scale;
  ROPEWALK_TRY(fields.Number("factor", 1e-6, kMaxFactor, &factor));
  ROPEWALK_TRY(fields.Number("beta", 1e-6, kMaxFactor, &beta));
  ROPEWALK_TRY(fields.Number("alpha", 1e-6, kMaxFactor, &alpha));
  ROPEWALK_TRY(fields.Integer("original_max_position_embeddings", 1, kMaxLength, &original));
  ROPEWALK_TRY(fields.Boolean("apply_scale", &scale));
  ROPEWALK_TRY(fields.RefuseOthers("Ropewalk"));
  (*rule)["rope_type"] = "yarn";
  for (const char* key : {"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"}) {
    if (!fields.Has(key)) return Missing(fields, key, "yarn");
  }
  (*rule)["factor"] = *factor;
  (*rule)["original_max_position_embeddings"] = *original;
  (*rule)["beta_fast"] = *beta;
  (*rule)["beta_slow"] = *alpha;
  if (!*scale) (*rule)["attention_factor"] = 1.0;
  return {};
}

}  // namespace ropewalk
