// The CPU targets: the kernel compiled for several instruction sets, and which of them this CPU runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "rope/backward.h"
#include "rope/call.h"

// For Highway, whose headers come after this one. SVE does not compile with every g++ that we support; SSSE3 and the
// AES extras add nothing to this kernel.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_SSSE3)
#define HWY_DISABLE_PCLMUL_AES

namespace ropewalk {

class FirstFault;

// Does rows [begin, end) of the batch x tokens rows; tells first_fault of faults. `scratch`: see CpuScratch.
using CpuKernel = void (*)(const RopeCall& call, int64_t begin, int64_t end, FirstFault* first_fault, void* scratch);

// The gradient of rows [begin, end), likewise. `sums`: see RopeCpuBackwardPlan; null if no weight's gradient is wanted.
using CpuBackwardKernel = void (*)(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                                   void* scratch, float* sums);

struct CpuTarget {
  const char* name;
  bool (*supported)();
  CpuKernel (*choose)(const RopeVariant& variant);
  CpuBackwardKernel backward;
};

// Best first.
std::span<const CpuTarget> CpuTargets();

}  // namespace ropewalk
