// A library that stands in for NVRTC where only the host's side is tested: its cubin is a header and the source's text.
// Environment: FAKE_NVRTC_VERSION (default "13.0"), FAKE_NVRTC_LOG (a file that gets a line for each compilation),
// FAKE_NVRTC_FAIL=1 (every compilation fails), FAKE_NVRTC_DELAY_MS.
// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

struct FakeProgram {
  std::string source, cubin, log;
};

std::string Environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

constexpr int kArchs[] = {75, 80, 86, 89, 90, 100, 103, 120};

}  // namespace

FAKE_API const char* nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
FAKE_API int nvrtcVersion(int* major, int* minor) {
  std::sscanf(Environment("FAKE_NVRTC_VERSION", "13.0").c_str(), "%d.%d", major, minor);
  return 0;
}
FAKE_API int nvrtcGetNumSupportedArchs(int* count) { return *count = static_cast<int>(std::size(kArchs)), 0; }
FAKE_API int nvrtcGetSupportedArchs(int* archs) {
  std::memcpy(archs, kArchs, sizeof(kArchs));
  return 0;
}
FAKE_API int nvrtcCreateProgram(FakeProgram** program, const char* source, const char*, int, const char* const*,
                                const char* const*) {
  *program = new FakeProgram{source, "", ""};
  return 0;
}
FAKE_API int nvrtcDestroyProgram(FakeProgram** program) {
  delete *program;
  *program = nullptr;
  return 0;
}
FAKE_API int nvrtcCompileProgram(FakeProgram* program, int count, const char* const* options) {
  std::this_thread::sleep_for(std::chrono::milliseconds(std::atoi(Environment("FAKE_NVRTC_DELAY_MS", "0").c_str())));
  if (const std::string path = Environment("FAKE_NVRTC_LOG", ""); !path.empty()) {
    if (FILE* file = std::fopen(path.c_str(), "a")) {
      std::fputs("compiled\n", file);
      std::fclose(file);
    }
  }
  program->cubin =
      "\x7f"
      "ELF fake";
  for (int i = 0; i < count; ++i) program->cubin += std::string(" ") + options[i];
  program->cubin += "\n" + program->source;
  if (Environment("FAKE_NVRTC_FAIL", "0") != "1") return 0;
  program->log = "rope_kernel.cu(1): error: a fake error";
  return 6;
}
FAKE_API int nvrtcGetProgramLogSize(FakeProgram* program, size_t* size) { return *size = program->log.size() + 1, 0; }
FAKE_API int nvrtcGetProgramLog(FakeProgram* program, char* log) {
  std::memcpy(log, program->log.c_str(), program->log.size() + 1);
  return 0;
}
FAKE_API int nvrtcGetCUBINSize(FakeProgram* program, size_t* size) { return *size = program->cubin.size() + 1, 0; }
FAKE_API int nvrtcGetCUBIN(FakeProgram* program, char* cubin) {
  std::memcpy(cubin, program->cubin.c_str(), program->cubin.size() + 1);
  return 0;
}
