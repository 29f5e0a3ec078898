// What `ropewalk describe --python` prints: bindings/python/ropewalk/_face.py, from the description.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "cli/common.h"

namespace ropewalk::cli {

// With a capital, but for an argument's name, and a full stop.
std::string Sentence(std::string text);

// The text of bindings/python/ropewalk/_face.py for this description.
std::string PythonFace(const Json& description);

}  // namespace ropewalk::cli
