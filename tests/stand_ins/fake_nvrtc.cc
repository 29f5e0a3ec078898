// A library that stands in for NVRTC: its calls, but for what compiles (fake_nvrtc.h).
// Environment: FAKE_NVRTC_VERSION (default "13.0").
// SPDX-License-Identifier: Apache-2.0
#include "tests/stand_ins/fake_nvrtc.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {
constexpr int kArchs[] = {75, 80, 86, 89, 90, 100, 103, 120};
}  // namespace

FAKE_API const char* nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
FAKE_API int nvrtcVersion(int* major, int* minor) {
  const char* version = std::getenv("FAKE_NVRTC_VERSION");
  std::sscanf(version ? version : "13.0", "%d.%d", major, minor);
  return 0;
}
FAKE_API int nvrtcGetNumSupportedArchs(int* count) { return *count = static_cast<int>(std::size(kArchs)), 0; }
FAKE_API int nvrtcGetSupportedArchs(int* archs) {
  std::memcpy(archs, kArchs, sizeof(kArchs));
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
  std::memcpy(cubin, program->cubin.data(), program->cubin.size());
  return 0;
}
