// The CUDA backend: finds the driver when first asked, compiles the exact variant, launches it on the caller's stream.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "backends/cuda/plan.h"
#include "backends/registry.h"

namespace ropewalk {

// The shape of this thread's next plans, for `ropewalk tune` to try; none: as it is chosen.
void TryRopeCudaShape(const std::optional<RopeCudaShape>& shape);

}  // namespace ropewalk
