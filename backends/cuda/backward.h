// How the gradient is cut on an NVIDIA GPU: the variants of its two kernels and their grids.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/plan.h"
#include "rope/backward.h"

namespace ropewalk {

// Of the sums in a workspace, which is a little larger for it.
constexpr int kSumsAlignment = 32;

struct RopeCudaBackwardPlan {
  RopeCudaKey key, sums_key;
  int32_t q_blocks = 0, k_blocks = 0;  // both 0: there is no work
  uint32_t sums_blocks = 0;            // of the second kernel; 0: no weight's gradient is wanted
  int64_t workspace = 0;               // floats
};

// Of a call with a norm.
Status PlanRopeCudaBackward(const RopeBackwardCall& call, const CudaDevice& device, RopeCudaBackwardPlan* plan);

}  // namespace ropewalk
