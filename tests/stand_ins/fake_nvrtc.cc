// A library that stands in for NVRTC where only the host's side is tested: a "cubin" is a header and the source's text.
// Environment: FAKE_NVRTC_LOG (a file that gets a line for each compilation), FAKE_NVRTC_FAIL=1 (every compilation
// fails), FAKE_NVRTC_DELAY_MS.
// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "tests/stand_ins/fake_nvrtc.h"

namespace {

std::string Environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

}  // namespace

int Compile(FakeProgram* program, const std::vector<std::string>& options) {
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
  for (const std::string& option : options) program->cubin += " " + option;
  program->cubin += "\n" + program->source;
  program->cubin.push_back('\0');
  if (Environment("FAKE_NVRTC_FAIL", "0") != "1") return 0;
  program->log = "rope_kernel.cu(1): error: a fake error";
  return 6;
}
