// The heads of real models, as engines hand them to the operation: what cases are drawn from.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

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

}  // namespace ropewalk
