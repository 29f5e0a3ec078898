// SPDX-License-Identifier: Apache-2.0
#include "models/read_rule.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "base/fork.h"

namespace ropewalk {
namespace {

using RopeTypeMap = std::map<std::string, RopeType, std::less<>>;
const RopeTypeMap* MakeRopeTypes() {
  return new RopeTypeMap{{"default", RopeType::kDefault},
                         {"linear", RopeType::kLinear},
                         {"dynamic", RopeType::kDynamic},
                         {"yarn", RopeType::kYarn},
                         {"longrope", RopeType::kLongrope},
                         {"llama3", RopeType::kLlama3},
                         {"proportional", RopeType::kProportional},
                         {"su", RopeType::kLongrope},     // Phi-3's first name for longrope
                         {"mrope", RopeType::kDefault}};  // Qwen2-VL's first name for default with mrope_section
}
const RopeTypeMap& RopeTypes() { return OnceMade<RopeTypeMap, MakeRopeTypes>::Get(); }

void Warn(RopeRule* rule, std::string_view sentence) {
  if (!rule->warnings.empty()) rule->warnings += '\n';
  rule->warnings += sentence;
}

Status ReadType(Fields* fields, std::string* name, RopeRule* rule) {
  std::optional<std::string> new_name, old_name;
  ROPEWALK_TRY(fields->Text("rope_type", &new_name));
  ROPEWALK_TRY(fields->Text("type", &old_name));
  *name = new_name.value_or(old_name.value_or("default"));
  const auto found = RopeTypes().find(*name);
  if (found == RopeTypes().end()) {
    return Status::Invalid(
        fields->Name(new_name ? "rope_type" : "type") + " must be one of " +
        AnyOf(std::vector<std::string>{"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}) +
        ", but is " + Quoted(*name));
  }
  rule->type = found->second;
  if (new_name && old_name) {  // a stale one stays behind when a tool rewrites the other
    const auto old_type = RopeTypes().find(*old_name);
    if (old_type == RopeTypes().end() || old_type->second != rule->type) {
      Warn(rule, fields->Name("type") + " is ignored: it is " + Quoted(*old_name) + ", but rope_type is " +
                     Quoted(*new_name));
    }
  }
  return {};
}

// What transformers, too, goes on without: left behind in the configurations of models whose own code had them.
void IgnoreWithWarning(Fields* fields, RopeRule* rule) {
  for (const char* key : {"attn_factor", "extrapolation_factor", "finetuned"}) {
    if (fields->Has(key)) Warn(rule, fields->Name(key) + " is ignored, as transformers ignores it");
  }
}

Status ReadOriginalPosition(Fields* fields, const Surroundings& around, std::optional<int64_t>* out) {
  std::optional<int64_t> inside;
  ROPEWALK_TRY(fields->Integer("original_max_position_embeddings", 1, kMaxLength, &inside));
  return Agree<int64_t>({{fields->Name("original_max_position_embeddings"), inside},
                         {around.prefix + "original_max_position_embeddings", around.original_position}},
                        out);
}

Status ReadYarn(Fields* fields, const Surroundings& around, RopeRule* rule) {
  std::optional<double> beta_fast, beta_slow, mscale, mscale_all_dim, attention_factor;
  std::optional<bool> truncate;
  std::optional<int64_t> original;
  ROPEWALK_TRY(fields->Number("beta_fast", 1e-6, kMaxFactor, &beta_fast));
  ROPEWALK_TRY(fields->Number("beta_slow", 1e-6, kMaxFactor, &beta_slow));
  ROPEWALK_TRY(fields->Number("mscale", 0, kMaxFactor, &mscale));
  ROPEWALK_TRY(fields->Number("mscale_all_dim", 0, kMaxFactor, &mscale_all_dim));
  ROPEWALK_TRY(fields->Number("attention_factor", 0, kMaxFactor, &attention_factor));
  ROPEWALK_TRY(fields->Boolean("truncate", &truncate));
  ROPEWALK_TRY(ReadOriginalPosition(fields, around, &original));
  if (!original) original = around.max_position;  // as transformers does
  if (!original) return Missing(*fields, "original_max_position_embeddings", "yarn");
  rule->beta_fast = beta_fast.value_or(32);
  rule->beta_slow = beta_slow.value_or(1);
  if (rule->beta_fast < rule->beta_slow) {  // the ramp then falls; transformers warns and goes on, too
    Warn(rule, fields->Name("beta_fast") + " should be at least beta_slow, " + Show(rule->beta_slow) + ", but is " +
                   Show(rule->beta_fast));
  }
  rule->truncate = truncate.value_or(true);
  if (around.by_layer && !rule->truncate) {
    return Status::Invalid(fields->Name("truncate") +
                           " is false, which transformers does not read of a layer type: leave it out, or " + kWayOut);
  }
  rule->original_position = *original;
  const auto scale = [&](double m) { return rule->factor <= 1 ? 1.0 : 0.1 * m * std::log(rule->factor) + 1.0; };
  if (attention_factor) {
    rule->attention_scaling = *attention_factor;
  } else if (mscale.value_or(0) != 0 && mscale_all_dim.value_or(0) != 0) {
    rule->attention_scaling = scale(*mscale) / scale(*mscale_all_dim);
  } else {
    rule->attention_scaling = scale(1);
  }
  return {};
}

Status ReadLongrope(Fields* fields, const Surroundings& around, std::string_view type, RopeRule* rule) {
  std::optional<std::vector<double>> short_factor, long_factor;
  std::optional<double> factor, attention_factor, short_mscale, long_mscale;
  std::optional<int64_t> original;
  ROPEWALK_TRY(fields->Numbers("short_factor", 1e-6, 1e12, &short_factor));
  ROPEWALK_TRY(fields->Numbers("long_factor", 1e-6, 1e12, &long_factor));
  ROPEWALK_TRY(fields->Number("factor", 1e-6, kMaxFactor, &factor));
  ROPEWALK_TRY(fields->Number("attention_factor", 0, kMaxFactor, &attention_factor));
  ROPEWALK_TRY(fields->Number("short_mscale", 0, kMaxFactor, &short_mscale));  // Phi-3.5-MoE
  ROPEWALK_TRY(fields->Number("long_mscale", 0, kMaxFactor, &long_mscale));
  ROPEWALK_TRY(ReadOriginalPosition(fields, around, &original));
  if (!short_factor) return Missing(*fields, "short_factor", type);
  if (!long_factor) return Missing(*fields, "long_factor", type);
  if (!original) return Missing(*fields, "original_max_position_embeddings", type);
  for (const auto& [key, numbers] :
       {std::pair{"short_factor", &short_factor}, std::pair{"long_factor", &long_factor}}) {
    if (std::ssize(**numbers) != rule->rotary_dim / 2) {
      return Status::Invalid(fields->Name(key) + " must have " + std::to_string(rule->rotary_dim / 2) +
                             " numbers, one for each pair of the rotated part, but has " +
                             std::to_string((*numbers)->size()));
    }
  }
  if (short_mscale.has_value() != long_mscale.has_value()) {
    return Missing(*fields, short_mscale ? "long_mscale" : "short_mscale", type);
  }
  const bool is_long = around.sequence_length > *original;
  rule->divisors = is_long ? *long_factor : *short_factor;
  if (attention_factor) {
    rule->attention_scaling = *attention_factor;
  } else if (short_mscale) {
    rule->attention_scaling = is_long ? *long_mscale : *short_mscale;
  } else {
    if (!factor && !around.max_position) return Missing(*fields, "factor", type);
    if (!factor) factor = static_cast<double>(*around.max_position) / static_cast<double>(*original);
    if (*factor > 1 && *original < 2) {
      return Status::Invalid(fields->Name("original_max_position_embeddings") + " must be at least 2, but is 1");
    }
    rule->attention_scaling =
        *factor <= 1 ? 1 : std::sqrt(1 + std::log(*factor) / std::log(static_cast<double>(*original)));
  }
  return {};
}

Status ReadLlama3(Fields* fields, const Surroundings& around, RopeRule* rule) {
  std::optional<double> low, high;
  std::optional<int64_t> original;
  ROPEWALK_TRY(fields->Number("low_freq_factor", 0, kMaxFactor, &low));
  ROPEWALK_TRY(fields->Number("high_freq_factor", 1e-6, kMaxFactor, &high));
  ROPEWALK_TRY(ReadOriginalPosition(fields, around, &original));
  if (!low) return Missing(*fields, "low_freq_factor", "llama3");
  if (!high) return Missing(*fields, "high_freq_factor", "llama3");
  if (!original) return Missing(*fields, "original_max_position_embeddings", "llama3");
  if (*high < *low) {  // equal ones are Llama 4 Scout's: nothing is blended
    Warn(rule, fields->Name("high_freq_factor") + " should be at least low_freq_factor, " + Show(*low) + ", but is " +
                   Show(*high));
  }
  rule->low_freq_factor = *low;
  rule->high_freq_factor = *high;
  rule->original_position = *original;
  return {};
}

Status ReadDynamic(Fields* fields, const Surroundings& around, std::optional<double> factor, RopeRule* rule) {
  std::optional<double> alpha;
  std::optional<int64_t> original, inside, max_position;
  ROPEWALK_TRY(fields->Number("alpha", 1e-6, 1e9, &alpha));
  if (rule->rotary_dim <= 2)
    return Status::Invalid(fields->Name("rope_type") + " \"dynamic\" needs more than one pair");
  if (alpha) {  // HunYuan: theta is stretched once, whatever the length; its configurations carry yarn's fields unused
    for (const char* unused : {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}) fields->Find(unused);
    rule->alpha = *alpha;
    return {};
  }
  if (!factor) return Missing(*fields, "factor", "dynamic");
  ROPEWALK_TRY(ReadOriginalPosition(fields, around, &original));
  ROPEWALK_TRY(fields->Integer("max_position_embeddings", 1, kMaxLength, &inside));
  ROPEWALK_TRY(Agree<int64_t>({{fields->Name("max_position_embeddings"), inside},
                               {around.prefix + "max_position_embeddings", around.max_position},
                               {fields->Name("original_max_position_embeddings"), original}},
                              &max_position));
  if (!max_position) return Missing(*fields, "max_position_embeddings", "dynamic");
  rule->max_position = *max_position;
  rule->sequence_length = std::max(around.sequence_length, *max_position);
  const double ratio = rule->factor * static_cast<double>(rule->sequence_length) / static_cast<double>(*max_position);
  if (ThetaIsTooLarge(*rule, ratio - (rule->factor - 1))) {
    return Status::Invalid(fields->Name("factor") + " " + Show(rule->factor) + " is too large for a sequence of " +
                           std::to_string(rule->sequence_length));
  }
  return {};
}

// Which row of positions each pair takes: sections one after the other (Qwen2-VL), or interleaved (Qwen3-VL), where the
// pairs 1, 4, .. below 3h take row 1, the pairs 2, 5, .. below 3w row 2 and the others row 0.
Status ReadSections(Fields* fields, const Surroundings& around, std::string_view type, RopeRule* rule) {
  std::optional<std::vector<int64_t>> sections;
  std::optional<bool> interleaved, omni_interleaved;
  ROPEWALK_TRY(fields->Integers("mrope_section", 0, kMaxRotaryDim, &sections));
  ROPEWALK_TRY(fields->Boolean("mrope_interleaved", &interleaved));
  ROPEWALK_TRY(fields->Boolean("interleaved", &omni_interleaved));  // Qwen3-Omni has both
  const std::string name = fields->Name("mrope_section");
  if (!sections) {
    if (type == "mrope") return Missing(*fields, "mrope_section", type);
    if (interleaved.value_or(omni_interleaved.value_or(false))) {
      return Status::Invalid(name + " is missing, but mrope_interleaved needs it");
    }
    return {};
  }
  if (around.mrope == TraitMrope::kUnsupported) {
    return Status::Invalid(name + ": the multimodal rotation of model_type " + Quoted(around.model_type) +
                           " is not supported: it turns the two elements of a pair by different positions");
  }
  const int64_t pairs = rule->rotary_dim / 2;
  int64_t sum = 0;
  for (const int64_t section : *sections) sum += section;
  if (sections->size() != 3 || sum != pairs) {
    return Status::Invalid(name + " must have 3 numbers whose sum is " + std::to_string(pairs) +
                           ", the pairs of the rotated part, but has " + std::to_string(sections->size()) +
                           " whose sum is " + std::to_string(sum));
  }
  bool interleave = around.mrope == TraitMrope::kInterleaved;
  for (const auto& [key, flag] : {std::pair{"mrope_interleaved", interleaved}, {"interleaved", omni_interleaved}}) {
    if (!flag) continue;
    if (interleave && !*flag) {
      return Status::Invalid(fields->Name(key) + " is false, but model_type " + Quoted(around.model_type) +
                             " interleaves");
    }
    interleave = *flag;
  }
  rule->axes.assign(static_cast<size_t>(pairs), 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int32_t& row = rule->axes[static_cast<size_t>(pair)];
    if (around.mrope == TraitMrope::kErnie) {  // height and width by turns, then time
      row = pair >= (*sections)[0] + (*sections)[1] ? 0 : 1 + static_cast<int32_t>(pair % 2);
    } else if (interleave) {
      const int64_t axis = pair % 3;
      row = axis != 0 && pair < 3 * (*sections)[static_cast<size_t>(axis)] ? static_cast<int32_t>(axis) : 0;
    } else {
      row = pair < (*sections)[0] ? 0 : pair < (*sections)[0] + (*sections)[1] ? 1 : 2;
    }
  }
  for (const int64_t axis : {1, 2}) {
    const auto found = std::count(rule->axes.begin(), rule->axes.end(), static_cast<int32_t>(axis));
    if (around.mrope != TraitMrope::kErnie && found != (*sections)[static_cast<size_t>(axis)]) {
      return Status::Invalid(name + "[" + std::to_string(axis) + "] is " +
                             std::to_string((*sections)[static_cast<size_t>(axis)]) + ", but interleaved only " +
                             std::to_string(found) + " of the pairs can take it");
    }
  }
  return {};
}

}  // namespace

Status MissingTheta(const Surroundings& around) {
  const std::string which = around.model_type.empty() ? "a model_type, which would tell it, is missing, too"
                            : around.known
                                ? "model_type " + Quoted(around.model_type) + " has no default"
                                : "model_type " + Quoted(around.model_type) + " is not one that Ropewalk knows";
  return Status::Invalid(around.prefix + "rope_theta is missing, and " + which + ": give it, or " + kWayOut);
}

Status ReadRule(const Json& object, const std::string& where, const Surroundings& around, RopeRule* rule) {
  Fields fields(object, where);
  std::string type;
  ROPEWALK_TRY(ReadType(&fields, &type, rule));
  IgnoreWithWarning(&fields, rule);

  std::optional<double> theta_inside, theta;
  ROPEWALK_TRY(fields.Number("rope_theta", 1, kMaxTheta, &theta_inside));
  ROPEWALK_TRY(Agree<double>(
      {{fields.Name("rope_theta"), theta_inside}, {around.prefix + around.theta_name, around.theta}}, &theta));
  if (!theta && around.default_theta == 0) return MissingTheta(around);
  rule->theta = theta.value_or(around.default_theta);
  if (!(rule->theta > 1)) return Status::Invalid(around.prefix + "rope_theta must be greater than 1, but is 1");

  // How much of the head turns.
  std::optional<double> partial_inside, partial;
  ROPEWALK_TRY(fields.Number("partial_rotary_factor", 0, 1, &partial_inside));
  ROPEWALK_TRY(Agree<double>(
      {{fields.Name("partial_rotary_factor"), partial_inside}, {around.prefix + around.partial_name, around.partial}},
      &partial));
  if (!partial && around.default_partial < 0) {
    return Status::Invalid(around.prefix + "partial_rotary_factor is missing, and model_type " +
                           Quoted(around.model_type) + " has no default: give it, or " + kWayOut);
  }
  rule->rotary_dim = around.head_dim;
  if (partial && around.turns_whole && !around.rotary_dim && rule->type == RopeType::kDefault &&
      static_cast<int64_t>(static_cast<double>(around.head_dim) * *partial) != around.head_dim) {
    return Status::Invalid(
        (partial_inside ? fields.Name("partial_rotary_factor") : around.prefix + around.partial_name) + " is " +
        Show(*partial) +
        (around.known ? ", but the code of model_type " + Quoted(around.model_type) +
                            " turns whole heads by rope_type \"default\""
                      : ", which the code of model_type " + Quoted(around.model_type) +
                            ", which Ropewalk does not know, may not read") +
        ": give 1, or " + kWayOut);
  }
  const bool proportional = rule->type == RopeType::kProportional;
  if (around.rotary_dim && !(proportional && *around.rotary_dim == around.head_dim)) {
    const auto by_factor = static_cast<int64_t>(static_cast<double>(around.head_dim) * partial.value_or(1));
    if (partial && by_factor != *around.rotary_dim && (*partial != 1 || around.head_dim == 0 || !around.is_mla)) {
      return Status::Invalid(
          (partial_inside ? fields.Name("partial_rotary_factor") : around.prefix + around.partial_name) + " is " +
          Show(*partial) + ", but rotary_dim is " + std::to_string(*around.rotary_dim) +
          (around.head_dim > 0 ? " of a head of " + std::to_string(around.head_dim) : ""));
    }
  }
  if (proportional) {
    rule->partial = partial.value_or(around.default_partial);
  } else if (around.rotary_dim) {
    rule->rotary_dim = *around.rotary_dim;
  } else {
    const double part = partial.value_or(around.default_partial);
    rule->rotary_dim = static_cast<int64_t>(static_cast<double>(around.head_dim) * part);
  }
  if (rule->rotary_dim < 2 || rule->rotary_dim % 2 != 0 || rule->rotary_dim > kMaxRotaryDim) {
    return Status::Invalid(around.prefix + "rotary_dim must be an even number from 2 to " +
                           std::to_string(kMaxRotaryDim) + ", but is " + std::to_string(rule->rotary_dim));
  }

  std::optional<double> factor;
  if (rule->type != RopeType::kDefault && rule->type != RopeType::kLongrope) {
    ROPEWALK_TRY(fields.Number("factor", 1e-6, kMaxFactor, &factor));
    if (!factor && rule->type != RopeType::kProportional && rule->type != RopeType::kDynamic) {
      return Missing(fields, "factor", type);
    }
    rule->factor = factor.value_or(1);
  }
  if (rule->type == RopeType::kDynamic) ROPEWALK_TRY(ReadDynamic(&fields, around, factor, rule));
  if (rule->type == RopeType::kYarn) {
    ROPEWALK_TRY(ReadYarn(&fields, around, rule));
    // Ministral-3 has two more: one scales queries by position, which is attention's, the other is not used.
    for (const char* unused : {"llama_4_scaling_beta", "max_position_embeddings"}) fields.Find(unused);
  }
  if (rule->type == RopeType::kLongrope) ROPEWALK_TRY(ReadLongrope(&fields, around, type, rule));
  if (rule->type == RopeType::kLlama3) ROPEWALK_TRY(ReadLlama3(&fields, around, rule));
  ROPEWALK_TRY(ReadSections(&fields, around, type, rule));
  return fields.RefuseOthers("rope_type " + Quoted(type));
}

Status ReadScaling(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                   RopeRule* out) {
  if (!(theta > 1 && theta <= kMaxTheta)) {
    return Status::Invalid("theta must be greater than 1 and at most " + Show(kMaxTheta) + ", but is " + Show(theta));
  }
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > kMaxRotaryDim) {
    return Status::Invalid("rotary_dim must be an even number from 2 to " + std::to_string(kMaxRotaryDim) +
                           ", but is " + std::to_string(rotary_dim));
  }
  if (sequence_length < 0 || sequence_length > kMaxLength) {
    return Status::Invalid("sequence_length must be from 0 to " + std::to_string(kMaxLength) + ", but is " +
                           std::to_string(sequence_length));
  }
  OwnedJson scaling;
  static_cast<Json&>(scaling) = Json::object();
  if (!scaling_json.empty()) ROPEWALK_TRY(ParseJsonObject(scaling_json, "scaling", &scaling));
  Surroundings around;
  around.theta = theta;
  around.theta_name = "theta";
  around.head_dim = rotary_dim;
  around.rotary_dim = rotary_dim;
  around.sequence_length = sequence_length;
  Fields fields(scaling, "scaling.");
  ROPEWALK_TRY(fields.Integer("max_position_embeddings", 1, kMaxLength, &around.max_position));
  if (scaling.contains("max_position_embeddings")) scaling.erase("max_position_embeddings");
  return ReadRule(scaling, "scaling.", around, out);
}

}  // namespace ropewalk
