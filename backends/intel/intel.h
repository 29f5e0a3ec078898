// The Intel GPU backend, "intel": on a caller's SYCL queue (backends/sycl), or through Level Zero on the caller's
// command list. With neither, on a list of our own, and the call returns when the work is done.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/registry.h"

namespace ropewalk {

extern const Backend kIntelBackend;

}  // namespace ropewalk
