// The CPU backend: always there, the fastest target chosen at run time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/registry.h"

namespace ropewalk {

Status SetParallelFor(ropewalk_parallel_for parallel_for, void* context);
Status SetThreads(int32_t threads);

}  // namespace ropewalk
