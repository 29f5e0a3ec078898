// A call with every argument that can be given together.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conformance/cases.h"

namespace ropewalk {

inline RopeCase EveryArgumentCase(Angles angles) {
  return {.dtype = kBF16,
          .batch = 2,
          .tokens = 6,
          .q_heads = 4,
          .k_heads = 3,
          .head_dim = 32,
          .rotary_dim = 24,
          .out_of_place = true,
          .norm = true,
          .weight = Weight::kPlain,
          .weight_dtype = kF32,
          .angles = angles,
          .offsets_dtype = kI32,
          .axes = Axes::kSections,
          .axes_dtype = kI32,
          .cache = Cache::kNhd,
          .cache_dtype = kE4M3,
          .page_size = 5,
          .v_dim = 48,
          .scale = Scale::kPerHead};
}

}  // namespace ropewalk
