// The CPU targets: the kernel compiled for several instruction sets, and which of them this CPU runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "rope/call.h"

namespace ropewalk {

class FirstFault;

// Does rows [begin, end) of the batch x tokens rows; tells first_fault of faults. `scratch`: see CpuScratch.
using CpuKernel = void (*)(const RopeCall& call, int64_t begin, int64_t end, FirstFault* first_fault, void* scratch);

struct CpuTarget {
  const char* name;
  bool (*supported)();
  CpuKernel (*choose)(const RopeVariant& variant);
};

// Best first.
std::span<const CpuTarget> CpuTargets();

}  // namespace ropewalk
