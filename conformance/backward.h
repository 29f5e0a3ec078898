// Cases of the gradient: those of the operation that store nothing, and others drawn from all that a case can say. They
// are a list of their own, so that the operation's stays as it is.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "conformance/cases.h"
#include "conformance/memory.h"
#include "conformance/runner.h"

namespace ropewalk {

// Every `step`-th of RopeCases() that has a gradient.
std::vector<RopeCase> BackwardCases(size_t step);
// So many of RandomRopeCases, without their stores; three of four with a norm.
std::vector<RopeCase> RandomBackwardCases(uint64_t seed, int64_t count);

// Runs the gradient of the case twice, and compares with the reference.
CaseResult RunBackwardCase(const RopeCase& c, DeviceMemory& memory);

}  // namespace ropewalk
