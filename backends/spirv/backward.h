// How the gradient is cut for the SPIR-V kernels: the variants of its two kernels, their grids, what they are launched
// with. backends/opencl and backends/intel launch them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "backends/spirv/plan.h"
#include "base/status.h"
#include "rope/backward.h"

namespace ropewalk {

struct RopeSpirvBackwardPlan {
  RopeSpirvPlan rows;                  // work-groups in the first dimension alone: those of q, then those of k
  int32_t q_groups = 0, k_groups = 0;  // both 0: there is no work
  RopeSpirvKey sums_key;
  SpirvGrid sums;         // of the second kernel; empty: no weight's gradient is wanted
  int64_t workspace = 0;  // floats
};

// Of a call with a norm.
Status PlanRopeSpirvBackward(const RopeBackwardCall& call, const SpirvDevice& device, RopeSpirvBackwardPlan* plan);

// As RopeSpirvPlanFault: "" if the plan holds what the kernels take for granted.
std::string RopeSpirvBackwardPlanFault(const RopeBackwardCall& call, const SpirvDevice& device,
                                       const RopeSpirvBackwardPlan& plan);

// Of the first kernel and of the second; `frequencies` and `fault` as of FillRopeSpirvArgs.
void FillRopeSpirvBackwardArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, const void* frequencies,
                               void* fault, RopeSpirvArgs* args);
void FillRopeSpirvSumsArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, RopeSpirvArgs* args);

}  // namespace ropewalk
