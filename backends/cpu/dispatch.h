// The CPU targets: the kernel compiled for several instruction sets, and which of them this CPU runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "ops/rope/rope_call.h"

namespace ropewalk {

// Does rows [begin, end) of the batch x tokens rows; lowers *first_fault to the first faulty row.
using CpuKernel = void (*)(const RopeCall& call, int64_t begin, int64_t end, std::atomic<int64_t>* first_fault);

struct CpuTarget {
  const char* name;
  bool (*supported)();
  CpuKernel (*choose)(const RopeVariant& variant);
};

// Best first.
std::span<const CpuTarget> CpuTargets();

}  // namespace ropewalk
