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
constexpr std::string_view kRotaryWords[] = {"rope",  "rotary", "ntk",       "yarn",      "alibi", "position_embedding",
                                             "theta", "swa",    "base_freq", "freq_base", "nope"};
// Keys with such a word that say which layers rotate, or are of another part of the model.
constexpr std::string_view kNotOfTheRotation[] = {"no_rope_layers", "no_rope_layer_interval",
                                                  "max_position_embeddings"};
// What a key with "rope" or "rotary" has, if false is a choice between rotations ("rope_interleave") and not that there
// is none ("use_rope").
constexpr std::string_view kChoices[] = {"interleav", "scal",    "2d",      "3d",    "traditional", "finetuned",
                                         "value",     "dynamic", "ntk",     "yarn",  "partial",     "no_rope",
                                         "nope",      "without", "disable", "cache", "fus",         "kernel",
                                         "mrope",     "xdrope",  "flash",   "long"};
// True says that the model has no rotary embedding.
constexpr std::pair<std::string_view, std::string_view> kWithout[] = {
    {"alibi", "ALiBi"}, {"use_alibi", "ALiBi"}, {"nope", "NoPE"}, {"use_nope", "NoPE"}, {"mla_use_nope", "NoPE"}};
// True says that it has one, and nothing else.
constexpr std::string_view kWith[] = {"rotary",
                                      "rope",
                                      "use_rope",
                                      "use_rotary",
                                      "use_rotary_embedding",
                                      "use_rotary_embeddings",
                                      "use_rotary_position_embeddings",
                                      "use_rotary_pos_emb",
                                      "use_mem_rope"};
// The fields that are read, to find those meant where a letter is wrong.
constexpr std::string_view kRotaryKeys[] = {"rope_theta",
                                            "rope_scaling",
                                            "rope_parameters",
                                            "rope_base",
                                            "rope_ratio",
                                            "rope_pct",
                                            "rope_interleave",
                                            "rope_local_base_freq",
                                            "local_rope_theta",
                                            "global_rope_theta",
                                            "layer_rope_theta",
                                            "rotary_dim",
                                            "rotary_base",
                                            "rotary_emb_base",
                                            "rotary_emb_fraction",
                                            "rotary_pct",
                                            "rotary_percent",
                                            "partial_rotary_factor",
                                            "qk_rope_head_dim",
                                            "qk_nope_head_dim",
                                            "position_embedding_type",
                                            "original_max_position_embeddings"};

bool Contains(std::string_view key, std::string_view word) {
  const auto equal = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; };
  return std::search(key.begin(), key.end(), word.begin(), word.end(), equal) != key.end();
}

// Whether nothing can follow from a field: absent, switched off, empty.
bool SaysNothing(const Json& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) || (value.is_structured() && value.empty());
}

// A part of the configuration that is a model of its own, of what is seen, heard or folded, or that has a user's names.
bool IsOtherModel(std::string_view key, const Json& value) {
  const auto type = value.find("model_type");
  if (type != value.end() && type->is_string() && !type->get<std::string>().empty()) return true;
  for (const std::string_view word :
       {"vision", "visual", "image", "audio", "speech", "protein", "quantization", "label2id"}) {
    if (Contains(key, word)) return true;
  }
  return false;
}

bool ContainsRope(std::string_view key) {
  return Contains(key, "rotary") || (Contains(key, "rope") && !Contains(key, "propert") && !Contains(key, "europe"));
}

// Such a key that is false: there is no rotary embedding.
bool IsSwitch(std::string_view key) {
  return ContainsRope(key) &&
         std::ranges::none_of(kChoices, [&](std::string_view word) { return Contains(key, word); });
}

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

// "position_embedding_type", "positional_encoding", "pos_emb", ..: what kind of positions there are.
bool IsKindOfPositions(std::string_view key) {
  const std::string lower = Lower(key);
  std::string_view rest = lower;
  if (rest.ends_with("_type")) rest.remove_suffix(5);
  for (const std::string_view start : {"pos_", "position_", "positional_"}) {
    if (!rest.starts_with(start)) continue;
    const std::string_view end = rest.substr(start.size());
    for (const std::string_view kind : {"emb", "embed", "embedding", "embeddings", "enc", "encoding", "encodings"}) {
      if (end == kind) return true;
    }
  }
  return false;
}

bool IsRotaryKind(const Json& value) {
  const std::string kind = Lower(value.get_ref<const std::string&>());
  return kind == "rope" || kind == "rotary" || kind == "rope_gptj" || kind == "rope_gpt_neox";
}

// Whether one letter more, less or else, or two that changed places, are all that differs.
bool IsNear(std::string_view a, std::string_view b) {
  while (!a.empty() && !b.empty() && a.front() == b.front()) {
    a.remove_prefix(1);
    b.remove_prefix(1);
  }
  while (!a.empty() && !b.empty() && a.back() == b.back()) {
    a.remove_suffix(1);
    b.remove_suffix(1);
  }
  if (a.size() <= 1 && b.size() <= 1) return true;
  return a.size() == 2 && b.size() == 2 && a[0] == b[1] && a[1] == b[0];
}

// The field that a key must mean, or nothing.
std::string_view MeantBy(std::string_view key) {
  if (key.size() > 64) return {};
  const std::string lower = Lower(key);
  std::string_view bare = lower;
  while (bare.starts_with("_")) bare.remove_prefix(1);
  for (const std::string_view known : kRotaryKeys) {
    if (IsNear(bare, known)) return known;
  }
  return {};
}

Status RefuseSwitch(const std::string& name) {
  return Status::Invalid(name + " is false: such a model has no rotary embedding");
}

std::string Deeper(std::string where, const std::string& more) {
  if (where.size() < 200) where += more + ".";
  return where;
}

// Refuses what says that there is no rotary embedding, also in the parts that single models have for the attention.
Status RefuseWithout(const Json& object, const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    const std::string name = where + ShowKey(key);
    const auto without = std::ranges::find(kWithout, key, [](const auto& pair) { return pair.first; });
    if (without != std::end(kWithout) && value == true) {
      return Status::Invalid(name + " is true: a model with " + std::string(without->second) +
                             " has no rotary embedding");
    }
    if (IsKindOfPositions(key) && value.is_string() && !IsRotaryKind(value)) {
      if (!ContainsRope(value.get_ref<const std::string&>())) {
        return Status::Invalid(name + " is " + Show(value) + ": a model with such positions has no rotary embedding");
      }
      return Status::Invalid(name + " must be \"rope\" or \"rotary\", but is " + Show(value) + ": correct it, or " +
                             kWayOut);
    }
    if (value == false && IsSwitch(key)) return RefuseSwitch(name);
    if (value.is_object() && !IsOtherModel(key, value)) ROPEWALK_TRY(RefuseWithout(value, Deeper(where, ShowKey(key))));
  }
  return {};
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
  ROPEWALK_TRY(RefuseWithout(fields->object(), fields->where()));
  if (!traits.rotary_if.empty() && !fields->Has(traits.rotary_if)) {
    return Status::Invalid(fields->Name(traits.rotary_if) + " is missing: without it model_type " +
                           Quoted(traits.model_type) + " has no rotary embedding");
  }
  return {};
}

Status RefuseRotaryFields(const Fields& fields, bool inside) {
  for (const auto& [key, value] : fields.object().items()) {
    const std::string_view meant = MeantBy(key);
    const bool is_part = key == "attn_config";  // who reads it does not read all of it
    if ((fields.IsKnown(key) && !is_part) || (key.starts_with("_") && meant.empty())) continue;
    const std::string name = fields.where() + ShowKey(key);
    if (value == false && IsSwitch(key)) return RefuseSwitch(name);
    if (SaysNothing(value)) continue;
    if (value == true && std::ranges::find(kWith, key) != std::end(kWith)) continue;
    const bool kind = IsKindOfPositions(key);
    if (kind && value.is_string() && IsRotaryKind(value)) continue;
    bool rotary = kind;
    for (const std::string_view word : kRotaryWords) {
      rotary = rotary || (word == "rope" ? ContainsRope(key) : Contains(key, word));
    }
    if (!rotary && !meant.empty()) {
      return Status::Invalid(name + " is not a field that Ropewalk knows, but looks like " + std::string(meant) +
                             ": correct it, or " + kWayOut);
    }
    if (rotary && std::ranges::find(kNotOfTheRotation, key) == std::end(kNotOfTheRotation)) {
      return Status::Invalid(
          name + " is not a field that Ropewalk knows, and may change the rotation: correct it, or " + kWayOut);
    }
    if (!inside || !value.is_structured() || IsOtherModel(key, value)) continue;
    const bool known_part = is_part && fields.IsKnown(key);
    const auto look = [&](const Json& object, const std::string& where) {
      Fields part(object, Deeper(fields.where(), where));
      if (known_part) part.Ignore("rope_theta");
      return RefuseRotaryFields(part, inside);
    };
    if (value.is_object()) {
      ROPEWALK_TRY(look(value, ShowKey(key)));
      continue;
    }
    for (size_t i = 0; i < value.size(); ++i) {
      if (value[i].is_object() && !IsOtherModel(key, value[i])) {
        ROPEWALK_TRY(look(value[i], ShowKey(key) + "[" + std::to_string(i) + "]"));
      }
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
