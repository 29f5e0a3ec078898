// Scales on the host: read and checked when a call is lowered, and again when a later one is like it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "rope/arguments.h"

namespace ropewalk {

// Whether a tensor holds scales and lies on the host. Of scales on a device nothing is read.
bool HoldsHostScales(const Arg& arg, const DLTensor& tensor);
// The first of its scales that is of no use, as it or its inverse is no finite number above 0; -1: none.
int64_t FirstBadScale(const DLTensor& tensor);

}  // namespace ropewalk
