// Variables of the environment; docs/environment.md lists them all.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>

namespace ropewalk {

// Null if it is not set, and in a program that runs with other rights than its caller's (setuid): what a caller says
// there must not decide which code is loaded.
inline const char* EnvironmentVariable(const char* name) {
#ifdef __linux__
  return secure_getenv(name);
#else
  return std::getenv(name);
#endif
}

}  // namespace ropewalk
