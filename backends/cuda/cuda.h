// The CUDA backend: finds the driver when first asked, compiles the exact variant, launches it on the caller's stream.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/backend.h"

namespace ropewalk {

extern const Backend kCudaBackend;

}  // namespace ropewalk
