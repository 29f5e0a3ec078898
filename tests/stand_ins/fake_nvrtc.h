// Between the calls of a library that stands in for NVRTC (fake_nvrtc.cc) and what it makes of a program: text
// (fake_nvrtc_text.cc), or a kernel for the processor (emulated_nvrtc.cc).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <vector>

struct FakeProgram {
  std::string source, cubin, log;
  std::vector<std::pair<std::string, std::string>> headers;  // name, text
};

// Writes cubin or log; NVRTC's result, 6: an error in the program.
int Compile(FakeProgram* program, const std::vector<std::string>& options);
