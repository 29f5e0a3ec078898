// SPDX-License-Identifier: Apache-2.0
#include "models/model_config.h"

#include <optional>
#include <set>
#include <utility>

#include "frequencies/frequencies.h"
#include "models/json_fields.h"
#include "models/model_fields.h"
#include "models/model_traits.h"
#include "models/read_rule.h"

namespace ropewalk {
namespace {

constexpr ModelTraits kUnknown{.model_type = "", .theta = 0};

std::string Stem(std::string_view path) {
  const size_t slash = path.find_last_of("/\\");
  if (slash != std::string_view::npos) path.remove_prefix(slash + 1);
  return std::string(path.substr(0, path.find_last_of('.')));
}

constexpr const char* kTextParts[] = {"text_config", "llm_config", "language_config", "thinker_config"};

// The part of a configuration that describes the text model: a multimodal one nests it. Another such part must say the
// same, or nothing of the rotation.
Status FindText(const Json& whole, std::string_view name, const Json** out, std::string* where) {
  *out = &whole;
  *where = std::string(name) + ": ";
  const auto has_shape = [](const Json& object) {
    return object.contains("hidden_size") || object.contains("num_attention_heads") || object.contains("head_dim") ||
           object.contains("text_config");
  };
  for (int level = 0; level < 2; ++level) {  // Qwen-Omni: thinker_config.text_config
    Fields fields(**out, *where);
    const Json* found = nullptr;
    std::string found_key;
    for (const char* key : kTextParts) {
      const Json* inner = nullptr;
      ROPEWALK_TRY(Inner(&fields, key, &inner));
      if (inner == nullptr) continue;
      if (!has_shape(*inner)) {
        Fields part(*inner, fields.Name(key) + ".");
        for (const auto& [said, value] : inner->items()) {
          if (fields.object().contains(said) && fields.object()[said] == value) part.Ignore(said);
        }
        const Status status = RefuseRotaryFields(part, /*inside=*/true);
        if (status.ok()) continue;
        return Status::Invalid(status.text() + "; " + key + " is not read, as it has no hidden_size");
      }
      if (found != nullptr && *found != *inner) {
        return Status::Invalid(fields.Name(found_key) + " and " + key + " are both there and differ: leave one, or " +
                               kWayOut);
      }
      if (found != nullptr) continue;
      found = inner;
      found_key = key;
    }
    if (found == nullptr) break;
    *where += found_key + ".";
    *out = found;
  }
  return {};
}

// Refuses what the configuration says and the model's code passes over.
Status CheckIsRead(Fields* fields, const ModelTraits& traits, const Choice& choice, const Surroundings& around,
                   const RopeRule& rule) {
  const std::string code = "the code of model_type " + Quoted(traits.model_type);
  if (traits.rule == TraitRule::kNone &&
      (rule.type != RopeType::kDefault || rule.theta != around.theta.value_or(traits.theta))) {
    return Status::Invalid(choice.where.substr(0, choice.where.size() - 1) + " is not read by " + code +
                           ", which goes by rope_theta: give it, or " + kWayOut);
  }
  std::optional<int64_t> rotary_dim;
  if (traits.rotary_dim_unread) ROPEWALK_TRY(fields->Integer("rotary_dim", 1, kMaxSize, &rotary_dim));
  if (rotary_dim && *rotary_dim != rule.rotary_dim) {
    return Status::Invalid(fields->Name("rotary_dim") + " is " + std::to_string(*rotary_dim) + ", but " + code +
                           " rotates " + std::to_string(rule.rotary_dim));
  }
  return {};
}

}  // namespace

Status ReadLayerConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                       int64_t sequence_length, bool any_layer_type, ModelConfig* out) {
  if (name.empty()) name = "config.json";
  if (sequence_length < 0 || sequence_length > kMaxLength) {
    return Status::Invalid("sequence_length must be from 0 to " + std::to_string(kMaxLength) + ", but is " +
                           std::to_string(sequence_length));
  }
  OwnedJson whole;
  ROPEWALK_TRY(ParseJsonObject(json, name, &whole));
  const std::string file = std::string(name) + ": ";
  Fields top(whole, file);
  std::optional<std::string> model_name, class_name, model_type;
  ROPEWALK_TRY(top.Text("_name_or_path", &model_name));
  ROPEWALK_TRY(top.Text("_class_name", &class_name));
  out->name = model_name && !model_name->empty() ? *model_name : Stem(name);

  if (class_name) {
    const ModelTraits* found = FindTraits(*class_name);
    out->model_type = *class_name;
    out->known = found != nullptr;
    if (!layer_type.empty()) {
      return Status::Invalid("layer_type is " + Quoted(layer_type) + ", but " + std::string(name) +
                             " has no layer types");
    }
    ROPEWALK_TRY(ReadDiffusion(&top, found != nullptr ? *found : kUnknown, out));
    return RefuseRotaryFields(top, /*inside=*/!out->known);
  }

  const Json* text = nullptr;
  Surroundings around;
  ROPEWALK_TRY(FindText(whole, name, &text, &around.prefix));
  Fields fields(*text, around.prefix);
  ROPEWALK_TRY(fields.Text("model_type", &model_type));
  if (!model_type) ROPEWALK_TRY(top.Text("model_type", &model_type));
  out->model_type = model_type.value_or("");
  const ModelTraits* found = FindTraits(out->model_type);
  if (found == nullptr && out->model_type.empty() && fields.Has("dim") && fields.Has("n_heads")) {
    found = FindTraits(kMistralParams);
  }
  around.known = found != nullptr;
  out->known = found != nullptr && !found->frequencies_only;
  const ModelTraits& traits = found != nullptr ? *found : kUnknown;
  around.model_type = out->model_type;
  around.mrope = traits.mrope;
  around.sequence_length = sequence_length;
  ROPEWALK_TRY(CheckIsRotary(&fields, traits));

  around.default_theta = traits.theta;
  if (traits.partial != 0) around.default_partial = traits.partial;
  around.turns_whole = !around.model_type.empty() && traits.partial == 0 && !traits.part_read;
  ROPEWALK_TRY(ReadOwnTheta(&fields, traits.fields, &around.theta, &around.theta_name));
  if (!traits.theta_key.empty()) {
    ROPEWALK_TRY(FirstNumber(&fields, {traits.theta_key}, 1, kMaxTheta, &around.theta, &around.theta_name));
  } else if (!around.theta) {
    ROPEWALK_TRY(FirstNumber(&fields, {"rope_theta", "rotary_emb_base", "rope_base", "rotary_base"}, 1, kMaxTheta,
                             &around.theta, &around.theta_name));
  }
  ROPEWALK_TRY(FirstNumber(&fields,
                           {"partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent", "rotary_emb_fraction"},
                           0, 1, &around.partial, &around.partial_name));
  ROPEWALK_TRY(fields.Integer("original_max_position_embeddings", 1, kMaxLength, &around.original_position));

  std::vector<std::string> layer_list;
  ROPEWALK_TRY(ReadLayerTypes(&fields, &layer_list));
  const std::set<std::string> layer_types(layer_list.begin(), layer_list.end());
  std::vector<Choice> choices;
  OwnedJson made;  // a rule that is written down here alone
  static_cast<Json&>(made) = Json::object();
  ROPEWALK_TRY(ReadChoices(&fields, traits, around, layer_types, &made, &choices));
  const Choice* choice = nullptr;
  ROPEWALK_TRY(Choose(choices, layer_types, around.prefix, layer_type, any_layer_type, &choice));
  for (const Choice& each : choices) {
    if (!each.layer_type.empty() && each.object != nullptr) out->layer_types.push_back(each.layer_type);
  }
  if (choice->inherits_theta && !around.theta && !choice->object->contains("rope_theta") && traits.theta == 0) {
    return MissingTheta(around);  // before the shape, which such a configuration often lacks as well
  }
  ROPEWALK_TRY(ReadShape(&fields, traits, out, &around));

  if (!choice->layer_type.empty()) {
    std::optional<int64_t> global_head_dim;  // Gemma4: full attention has larger heads
    if (choice->layer_type == "full_attention") {
      ROPEWALK_TRY(fields.Integer("global_head_dim", 1, kMaxSize, &global_head_dim));
    }
    ROPEWALK_TRY(ReadOverride(&fields, layer_list, choice->layer_type, &global_head_dim));
    if (global_head_dim && !around.rotary_dim) out->head_dim = around.head_dim = *global_head_dim;
    if (!choice->inherits_theta) {
      around.theta = choice->theta;
      around.theta_name = choice->theta_name;
    }
    around.default_theta = choice->default_theta;
  }
  around.by_layer = !choice->layer_type.empty();
  ROPEWALK_TRY(ReadRule(*choice->object, choice->where, around, &out->rule));
  ROPEWALK_TRY(ReadOwnScaling(&fields, traits.fields, sequence_length, &out->rule));
  ROPEWALK_TRY(CheckIsRead(&fields, traits, *choice, around, out->rule));

  std::optional<bool> interleave, qk_norm;
  std::optional<double> eps;
  std::string eps_name;
  ROPEWALK_TRY(fields.Boolean("rope_interleave", &interleave));
  ROPEWALK_TRY(fields.Boolean("use_qk_norm", &qk_norm));
  ROPEWALK_TRY(FirstNumber(&fields, {"rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"}, 0, 1, &eps,
                           &eps_name));
  out->interleaved = traits.interleaved && interleave.value_or(true);
  out->norm = traits.norm != TraitNorm::kNone && qk_norm.value_or(!traits.norm_if_asked);
  out->zero_centered_weight = out->norm && traits.norm == TraitNorm::kRmsZeroCentered;
  if (eps) out->eps = *eps;
  out->axes = out->rule.axes.empty() ? 1 : 3;
  if (text != &whole) {  // around the text model: what is said there as well must be the same
    for (const auto& [key, value] : whole.items()) {
      if (text->contains(key) && (*text)[key] == value) top.Ignore(key);
    }
    ROPEWALK_TRY(RefuseRotaryFields(top, /*inside=*/false));
  }
  for (const char* key : kTextParts) fields.Ignore(key);  // FindText has looked there
  return RefuseRotaryFields(fields, /*inside=*/true);
}

Status ReadModelConfig(std::string_view json, std::string_view name, ModelConfig* out) {
  return WithoutThrowing([&]() -> Status {
    ModelConfig config;
    ROPEWALK_TRY(ReadLayerConfig(json, name, {}, 0, /*any_layer_type=*/true, &config));
    if (!config.known) {
      return Status::Invalid(std::string(name) + ": model_type " + Show(Json(config.model_type)) +
                             " is not one that Ropewalk knows, and so neither are its pairing and its norm");
    }
    *out = std::move(config);
    return {};
  });
}

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
