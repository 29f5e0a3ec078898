// A process for a scenario: a driver is opened once in a process and reads its settings then. And which OpenCL driver
// serves, the stand-ins for drivers, and a directory for what they write.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace ropewalk {

using Environment = std::vector<std::pair<const char*, std::string>>;

// A directory of this program's own, made at the first call and removed at the end of the process that made it; "" if
// it cannot be made. A child that makes it ends without its ends, so that InChild makes it first.
inline const std::string& Directory() {
  struct Made {
    std::string name = (std::filesystem::temp_directory_path() / "ropewalk-test-XXXXXX").string();
    pid_t owner = getpid();
    Made() {
      if (!mkdtemp(name.data())) name.clear();
    }
    ~Made() {
      std::error_code ignored;
      if (!name.empty() && owner == getpid()) std::filesystem::remove_all(name, ignored);
    }
  };
  static const Made made;
  return made.name;
}

inline void ChangeEnvironment(std::initializer_list<const char*> unset, const Environment& changes) {
  for (const char* name : unset) unsetenv(name);
  for (const auto& [name, value] : changes) setenv(name, value.c_str(), 1);
}

// What the body fails in or skips in its child, the test does. The child ends without the drivers' own ends, which may
// wait for a GPU.
inline void InChild(const std::function<void()>& body) {
  constexpr int kSkipped = 77;
  (void)Directory();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    body();
    fflush(stdout);
    _exit(testing::Test::HasFailure() ? 1 : testing::Test::IsSkipped() ? kSkipped : 0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_FALSE(WIFSIGNALED(status)) << "the process ended with signal " << WTERMSIG(status);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kSkipped) GTEST_SKIP() << "see above";
  EXPECT_EQ(status, 0) << "see above";
}

// Intel's run-time of OpenCL for CPUs, wherever the loader looks else: Debian's loader and Intel's own have each their
// variable. Before anything opens the loader.
inline void UseIntelRuntime(const char* driver) {
  if (getenv("OCL_ICD_VENDORS") || access(driver, R_OK) != 0) return;
  setenv("OCL_ICD_VENDORS", driver, 1);
  setenv("OCL_ICD_FILENAMES", driver, 1);
}

// What a stand-in lets a test see: by its function `symbol`, in the process where it stands for the driver.
template <class Fake>
Fake& FakeOf(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_NOW);
  auto* function = reinterpret_cast<Fake* (*)()>(handle ? dlsym(handle, symbol) : nullptr);
  return *function();
}

}  // namespace ropewalk
