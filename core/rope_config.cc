// Reads scaling rules and config.json into a RopeRule: one place for every spelling, old and new, and for everything
// that can be wrong with them.
// SPDX-License-Identifier: Apache-2.0
#include "core/rope_config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "core/fork.h"
#include "core/json_fields.h"
#include "core/model_fields.h"
#include "core/model_traits.h"
#include "core/text.h"

namespace ropewalk {
namespace {

constexpr double kDeepseekV4CompressTheta = 160000;

constexpr ModelTraits kUnknown{.model_type = "", .theta = 0};

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

const Json* MakeEmpty() { return new Json(Json::object()); }

// "a", "b" or "c".
template <class Range>
std::string AnyOf(const Range& names) {
  std::string text;
  size_t left = names.size();
  for (const auto& name : names) {
    text += Quoted(name);
    --left;
    if (left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

// One value that may stand in several places: they must agree. A place is its name in messages and its value.
template <class Value>
Status Agree(std::initializer_list<std::pair<std::string, std::optional<Value>>> places, std::optional<Value>* out) {
  const std::string* first = nullptr;
  for (const auto& [name, value] : places) {
    if (!value) continue;
    if (first == nullptr) {
      first = &name;
      *out = value;
    } else if (*value != **out) {
      return Status::Invalid(*first + " is " + Show(static_cast<double>(**out)) + ", but " + name + " is " +
                             Show(static_cast<double>(*value)));
    }
  }
  return {};
}

// What stands around a rope_parameters object and decides with it.
struct Surroundings {
  std::string prefix;                    // of messages: "config.json: "
  std::optional<double> theta, partial;  // of the configuration itself
  std::string theta_name = "rope_theta", partial_name = "partial_rotary_factor";
  double default_theta = 0, default_partial = 1;  // 0: theta must be given
  std::optional<int64_t> max_position, original_position;
  int64_t head_dim = 0;               // before `partial` is applied
  std::optional<int64_t> rotary_dim;  // given outright
  int64_t sequence_length = 0;
  TraitMrope mrope = TraitMrope::kContiguous;
  std::string_view model_type;
  bool known = false;  // the model_type
};

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

Status MissingTheta(const Surroundings& around) {
  const std::string which = around.model_type.empty() ? "a model_type, which would tell it, is missing, too"
                            : around.known
                                ? "model_type " + Quoted(around.model_type) + " has no default"
                                : "model_type " + Quoted(around.model_type) + " is not one that Ropewalk knows";
  return Status::Invalid(around.prefix + "rope_theta is missing, and " + which + ": give it, or " + kWayOut);
}

// The fields of one rope_parameters (rope_scaling) object.
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
  const bool proportional = rule->type == RopeType::kProportional;
  if (around.rotary_dim && !(proportional && *around.rotary_dim == around.head_dim)) {
    const auto by_factor = static_cast<int64_t>(static_cast<double>(around.head_dim) * partial.value_or(1));
    if (partial && by_factor != *around.rotary_dim && (*partial != 1 || around.head_dim == 0)) {
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

// ---------------------------------------------------------------------------------------------------------------------
// config.json

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

std::string Stem(std::string_view path) {
  const size_t slash = path.find_last_of("/\\");
  if (slash != std::string_view::npos) path.remove_prefix(slash + 1);
  return std::string(path.substr(0, path.find_last_of('.')));
}

// The part of a configuration that describes the text model: a multimodal one nests it.
Status FindText(const Json& whole, std::string_view name, const Json** out, std::string* where) {
  *out = &whole;
  *where = std::string(name) + ": ";
  for (int level = 0; level < 2; ++level) {  // Qwen-Omni: thinker_config.text_config
    Fields fields(**out, *where);
    const Json* inner = nullptr;
    std::string key;
    for (const char* candidate : {"text_config", "llm_config", "language_config", "thinker_config"}) {
      ROPEWALK_TRY(Inner(&fields, candidate, &inner));
      key = candidate;
      if (inner != nullptr) break;
    }
    const auto has_shape = [](const Json& object) {
      return object.contains("hidden_size") || object.contains("num_attention_heads") || object.contains("head_dim") ||
             object.contains("text_config");
    };
    if (inner == nullptr || !has_shape(*inner)) break;
    *where += key + ".";
    *out = inner;
  }
  return {};
}

Status ReadShape(Fields* fields, const ModelTraits& traits, RopeConfig* config, Surroundings* around) {
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
Status ReadDiffusion(Fields* fields, const ModelTraits& traits, RopeConfig* config) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Layer types

// Which object of rope parameters serves a layer type. `object` null: this layer type has no rotary embedding.
struct Choice {
  std::string layer_type;
  const Json* object;
  std::string where;
  bool inherits_theta;          // that of the configuration applies; else:
  std::optional<double> theta;  // Gemma3's rope_local_base_freq
  double default_theta;
  std::string theta_name = "rope_theta";
};

Status ReadChoices(Fields* fields, const ModelTraits& traits, const Surroundings& around,
                   const std::set<std::string>& layer_types, Json* made, std::vector<Choice>* choices) {
  const Json& empty = OnceMade<Json, MakeEmpty>::Get();
  const Json *new_spelling = nullptr, *old_spelling = nullptr;
  ROPEWALK_TRY(Inner(fields, "rope_parameters", &new_spelling));
  ROPEWALK_TRY(Inner(fields, "rope_scaling", &old_spelling));
  if (traits.fields == TraitFields::kMistralParams) {
    const Json* yarn = nullptr;
    ROPEWALK_TRY(Inner(fields, "yarn", &yarn));
    if (yarn != nullptr) {
      ROPEWALK_TRY(ReadMistralYarn(*yarn, fields->Name("yarn."), made));
      choices->push_back({"", made, fields->Name("yarn."), true, {}, around.default_theta});
      return {};
    }
  }
  if (new_spelling != nullptr && old_spelling != nullptr && *new_spelling != *old_spelling && !old_spelling->empty()) {
    return Status::Invalid(fields->Name("rope_scaling") + " and rope_parameters are both there and differ");
  }
  const bool use_new = new_spelling != nullptr;
  const Json* object = use_new ? new_spelling : old_spelling != nullptr ? old_spelling : &empty;
  const std::string where = fields->Name(use_new || old_spelling == nullptr ? "rope_parameters" : "rope_scaling");
  const double default_theta = around.default_theta;

  std::optional<double> local_theta, global_theta;
  std::string local_name, global_name;
  ROPEWALK_TRY(
      FirstNumber(fields, {"rope_local_base_freq", "local_rope_theta"}, 1, kMaxTheta, &local_theta, &local_name));
  if (local_theta || traits.local_theta != 0) {
    ROPEWALK_TRY(FirstNumber(fields, {"global_rope_theta"}, 1, kMaxTheta, &global_theta, &global_name));
  }

  if (traits.rule == TraitRule::kNoScaling && old_spelling != nullptr && !old_spelling->empty()) {
    return Status::Invalid(fields->Name("rope_scaling") + " is not read by the code of model_type " +
                           Quoted(traits.model_type) + ": give rope_parameters instead");
  }
  const bool nested = std::any_of(object->begin(), object->end(), [](const Json& value) { return value.is_object(); });
  // transformers passes over one for all layers where the model has two thetas.
  const bool by_layer = traits.rule == TraitRule::kNested ||
                        (use_new && !object->empty() && traits.local_theta != 0 && !traits.sliding_plain);
  if (!nested && (by_layer || (traits.rule == TraitRule::kGiven && object->empty()))) {
    return Status::Invalid(where + (object->empty() ? " is missing" : " is one for all layers") + ", but model_type " +
                           Quoted(traits.model_type) + " needs " + (by_layer ? "one for each layer type" : "it") +
                           ": give it, or " + kWayOut);
  }
  std::optional<double> compress_theta;
  if (traits.fields == TraitFields::kDeepseekV4) {
    ROPEWALK_TRY(fields->Number("compress_rope_theta", 1, kMaxTheta, &compress_theta));
  }
  if (nested) {
    for (const auto& [key, value] : object->items()) {
      const std::string inner = Text(where, ".", key);
      if (!value.is_object() && !value.is_null()) {
        return Status::Invalid(inner + " stands next to layer types and must be an object, but is " + Show(value));
      }
      // Serialised by transformers, a layer without rotary embedding is null.
      const bool inherits = value.is_null() || !value.contains("rope_theta") || value["rope_theta"].is_null();
      choices->push_back({key, value.is_null() ? nullptr : &value, inner + ".", inherits, {}, default_theta});
      if (local_theta && key == "sliding_attention") {  // said twice
        choices->back().inherits_theta = false;
        choices->back().theta = local_theta;
        choices->back().theta_name = local_name;
      }
    }
  } else if (traits.fields == TraitFields::kDeepseekV4) {
    // The layers that compress have a theta and the rule, but none of yarn's scaling of the attention, unless asked.
    *made = *object;
    const auto type = made->find(made->contains("rope_type") ? "rope_type" : "type");
    if (type != made->end() && *type == "yarn" && !made->contains("attention_factor")) {
      (*made)["attention_factor"] = 1.0;
    }
    made->erase("rope_theta");  // of the other layers
    choices->push_back({"main", &empty, where + ".", true, {}, default_theta});
    choices->push_back({"compress", made, where + ".", false, compress_theta, kDeepseekV4CompressTheta});
  } else if (traits.sliding_plain && use_new) {
    // transformers passes it over; what was meant (vLLM): the rule for full attention alone, theta for both.
    if (const auto theta = object->find("rope_theta"); theta != object->end()) (*made)["rope_theta"] = *theta;
    choices->push_back({"full_attention", object, where + ".", true, {}, default_theta});
    choices->push_back({"sliding_attention", made, where + ".", true, {}, default_theta});
  } else if (local_theta || traits.local_theta != 0) {
    choices->push_back({"full_attention", object, where + ".", !global_theta, global_theta, default_theta});
    choices->push_back({"sliding_attention", &empty, where + ".", false, local_theta,
                        traits.local_theta != 0 ? traits.local_theta : default_theta});
  } else {
    choices->push_back({"", object, where + ".", true, {}, default_theta});
    for (const auto& [key, value] : object->items()) {
      if (value.is_null() && layer_types.count(key) != 0) choices->push_back({key, nullptr, where + ".", true, {}, 0});
    }
  }
  return {};
}

Status Choose(const std::vector<Choice>& choices, const std::set<std::string>& layer_types, std::string_view prefix,
              std::string_view layer_type, bool any, const Choice** out) {
  std::vector<std::string> names;
  for (const Choice& choice : choices) {
    if (!choice.layer_type.empty() && choice.object != nullptr) names.push_back(choice.layer_type);
  }
  std::string file(prefix);  // "config.json", "config.json: text_config"
  file.resize(file.size() - (file.ends_with(".") ? 1 : 2));
  if (names == std::vector<std::string>{"main", "compress"}) {  // DeepSeek-V4's kinds of rotation, and who has them
    if (layer_type == "sliding_attention") layer_type = "main";
    if (layer_type == "compressed_sparse_attention" || layer_type == "heavily_compressed_attention") {
      layer_type = "compress";
    }
  }
  for (const Choice& choice : choices) {
    if (!layer_type.empty() && choice.layer_type == layer_type) {
      if (choice.object == nullptr) {
        return Status::Invalid(file + ": layers of type " + Quoted(layer_type) + " have no rotary embedding");
      }
      *out = &choice;
      return {};
    }
  }
  const Choice& first = choices.front();
  const bool flat = first.layer_type.empty();
  if (!layer_type.empty()) {
    if (flat && layer_types.count(std::string(layer_type)) != 0) {
      *out = &first;
      return {};
    }
    if (names.empty()) names.assign(layer_types.begin(), layer_types.end());
    return Status::Invalid("layer_type is " + Quoted(layer_type) + ", but " + file +
                           (names.empty() ? " has no layer types" : " has " + AnyOf(names)));
  }
  for (const Choice& choice : choices) {
    if (choice.object == nullptr) continue;
    if (*out == nullptr) *out = &choice;
    if (*choice.object == *(*out)->object && choice.theta == (*out)->theta &&
        choice.default_theta == (*out)->default_theta) {
      continue;
    }
    if (any) continue;
    return Status::Invalid("layer_type is missing, but " + file + " has different rotary embeddings for " +
                           AnyOf(names));
  }
  if (*out == nullptr) return Status::Invalid(file + ": no layer type has a rotary embedding");
  return {};
}

// Gemma4 as transformers serialises it: `per_layer_config` has an entry, by the layer's number ("05"), for those layers
// that differ; the first one of `layer_type` tells.
Status ReadOverride(Fields* fields, const std::vector<std::string>& layer_list, std::string_view layer_type,
                    std::optional<int64_t>* head_dim) {
  const Json* overrides = nullptr;
  ROPEWALK_TRY(Inner(fields, "per_layer_config", &overrides));
  if (overrides == nullptr) return {};
  for (const auto& [key, value] : overrides->items()) {
    size_t layer = 0;
    const auto parsed = std::from_chars(key.data(), key.data() + key.size(), layer);
    const bool matches = parsed.ec == std::errc() && layer < layer_list.size() && layer_list[layer] == layer_type;
    if (!matches || !value.is_object()) continue;
    Fields inner(value, fields->Name("per_layer_config.") + key + ".");
    return inner.Integer("head_dim", 1, kMaxSize, head_dim);
  }
  return {};
}

Status ReadLayerTypes(Fields* fields, std::vector<std::string>* of_each_layer) {
  const Json* list = fields->Find("layer_types");
  if (list == nullptr) return {};
  if (!list->is_array()) {
    return Status::Invalid(fields->Name("layer_types") + " must be an array, but is " + Show(*list));
  }
  for (const Json& entry : *list) {
    if (!entry.is_string()) {
      return Status::Invalid(fields->Name("layer_types") + " must hold strings, but holds " + Show(entry));
    }
    of_each_layer->push_back(entry.get<std::string>());
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

Status ReadRopeConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                      int64_t sequence_length, bool any_layer_type, RopeConfig* out) {
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
  return RefuseRotaryFields(fields, /*inside=*/found == nullptr);
}

}  // namespace ropewalk
