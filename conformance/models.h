// Real models: their heads, as engines hand them to the operation and cases are drawn from, and the configurations in a
// file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace ropewalk {

// The RMSNorm of each head of q and k before the rotation. Norms of another kind (over all heads, LayerNorm, after the
// rotation) are not part of the operation: kNone.
enum class HeadNorm : uint8_t { kNone, kWeight, kZeroCentered };

struct ModelHeads {
  const char* name;
  int32_t q_heads, k_heads, head_dim;
  int32_t rotary_dim, rotary_offset;
  int32_t pairing;
  HeadNorm norm;
  const char* source;  // the repository on huggingface.co whose config.json has the numbers
};

std::span<const ModelHeads> AllModelHeads();

// The heads that one of so many tensor-parallel ranks has, as vLLM and SGLang split them: the heads of q, and those of
// k, or one of them where there are fewer than ranks. False: they cannot be split so.
bool SplitHeads(const ModelHeads& model, int32_t ranks, int64_t* q_heads, int64_t* k_heads);

struct ConfigText {
  std::string name;   // of the file, or in it
  std::string place;  // for messages
  std::string json;   // what a model's config.json says
};
// Adds the configurations of a file: one called models.json has an object with those of many models by their names, any
// other file is a model's own.
Status ReadConfigs(const std::string& path, std::vector<ConfigText>* out);

}  // namespace ropewalk
