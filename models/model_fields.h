// Fields of a configuration that one model alone has; those that say that a model has no rotary embedding; those that
// nobody has read. What all of this room needs of fields stands here, too.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "frequencies/frequencies.h"
#include "models/json_fields.h"
#include "models/model_traits.h"

namespace ropewalk {

constexpr double kMaxTheta = 1e15, kMaxFactor = 1e6;
constexpr int64_t kMaxLength = int64_t{1} << 40;  // of a sequence
constexpr int64_t kMaxSize = int64_t{1} << 40;    // of a hidden state, before it is checked further
constexpr int64_t kMaxHeads = int64_t{1} << 20;
constexpr const char* kWayOut = "make Frequencies(theta=.., rotary_dim=..)";  // where a configuration is refused

std::string Quoted(std::string_view text);
Status Missing(const Fields& fields, std::string_view key, std::string_view type);
// An object inside the configuration, or null where it is absent.
Status Inner(Fields* fields, std::string_view key, const Json** out);
// The first of several spellings of a number, and which it was.
Status FirstNumber(Fields* fields, std::initializer_list<std::string_view> keys, double low, double high,
                   std::optional<double>* out, std::string* name);
// theta' of NTK scaling, whose float32 the table takes, stays far from its end.
bool ThetaIsTooLarge(const RopeRule& rule, double ratio);

// Refuses what says that the model has no rotary embedding, or one that is not ours.
Status CheckIsRotary(Fields* fields, const ModelTraits& traits);
// Names a field that nobody has read and that may change the rotation, or looks like one that is misspelt. `inside`:
// also in the objects and arrays that it holds, as some models have the attention's fields there.
Status RefuseRotaryFields(const Fields& fields, bool inside);

// Heads of k where a model has a way of its own to give them.
Status ReadOwnHeads(Fields* fields, TraitFields own, std::optional<int64_t>* k_heads);
// Theta likewise, and what its field is called.
Status ReadOwnTheta(Fields* fields, TraitFields own, std::optional<double>* theta, std::string* name);
// What changes the rule after it was read.
Status ReadOwnScaling(Fields* fields, TraitFields own, int64_t sequence_length, RopeRule* rule);
// Mistral's own params.json has yarn in words of its own; in transformers' words:
Status ReadMistralYarn(const Json& object, const std::string& where, Json* rule);

}  // namespace ropewalk
