// Which OpenCL driver the tests use.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdlib.h>
#include <unistd.h>

namespace ropewalk {

// Intel's run-time for CPUs in .venv, wherever the loader looks else: Debian's loader and Intel's own have each their
// variable. Before anything opens the loader.
inline void UseIntelRuntime() {
  if (getenv("OCL_ICD_VENDORS") || access(ROPEWALK_INTEL_OPENCL, R_OK) != 0) return;
  setenv("OCL_ICD_VENDORS", ROPEWALK_INTEL_OPENCL, 1);
  setenv("OCL_ICD_FILENAMES", ROPEWALK_INTEL_OPENCL, 1);
}

}  // namespace ropewalk
