// What ran where, for the summary of scripts/test.sh.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace ropewalk {

inline void Report(const std::string& line) {
  std::printf("%s\n", line.c_str());
  const char* path = std::getenv("ROPEWALK_TEST_COUNTS");
  if (FILE* file = path ? std::fopen(path, "a") : nullptr) {
    std::fputs((line + "\n").c_str(), file);
    std::fclose(file);
  }
}

}  // namespace ropewalk
