// The calls of a library that stands in for NVRTC. What it makes of a program, the file says that includes this one:
// text (fake_nvrtc.cc), or a kernel for the processor (emulated_nvrtc.cc). Environment: FAKE_NVRTC_VERSION (default
// "13.0").
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

struct FakeProgram {
  std::string source, cubin, log;
  std::vector<std::pair<std::string, std::string>> headers;  // name, text
};

// Writes cubin or log; NVRTC's result, 6: an error in the program.
int Compile(FakeProgram* program, const std::vector<std::string>& options);

#define FAKE_API extern "C" __attribute__((visibility("default")))

inline constexpr int kFakeArchs[] = {75, 80, 86, 89, 90, 100, 103, 120};

FAKE_API const char* nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
FAKE_API int nvrtcVersion(int* major, int* minor) {
  const char* version = std::getenv("FAKE_NVRTC_VERSION");
  std::sscanf(version ? version : "13.0", "%d.%d", major, minor);
  return 0;
}
FAKE_API int nvrtcGetNumSupportedArchs(int* count) { return *count = static_cast<int>(std::size(kFakeArchs)), 0; }
FAKE_API int nvrtcGetSupportedArchs(int* archs) {
  std::memcpy(archs, kFakeArchs, sizeof(kFakeArchs));
  return 0;
}
FAKE_API int nvrtcCreateProgram(FakeProgram** program, const char* source, const char*, int count,
                                const char* const* texts, const char* const* names) {
  *program = new FakeProgram{source, "", "", {}};
  for (int i = 0; i < count; ++i) (*program)->headers.emplace_back(names[i], texts[i]);
  return 0;
}
FAKE_API int nvrtcDestroyProgram(FakeProgram** program) {
  delete *program;
  *program = nullptr;
  return 0;
}
FAKE_API int nvrtcCompileProgram(FakeProgram* program, int count, const char* const* options) {
  return Compile(program, {options, options + count});
}
FAKE_API int nvrtcGetProgramLogSize(FakeProgram* program, size_t* size) { return *size = program->log.size() + 1, 0; }
FAKE_API int nvrtcGetProgramLog(FakeProgram* program, char* log) {
  std::memcpy(log, program->log.c_str(), program->log.size() + 1);
  return 0;
}
FAKE_API int nvrtcGetCUBINSize(FakeProgram* program, size_t* size) { return *size = program->cubin.size(), 0; }
FAKE_API int nvrtcGetCUBIN(FakeProgram* program, char* cubin) {
  std::ranges::copy(program->cubin, cubin);
  return 0;
}
