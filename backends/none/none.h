// Backends that are not built in: they say why and what would help, so that nothing else has to ask.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/backend.h"

namespace ropewalk {

extern const Backend kIntelBackend;

}  // namespace ropewalk
