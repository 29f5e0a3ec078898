// The device files, embedded at build time by cmake/embed.cmake, so that NVRTC needs no include directory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace ropewalk {

struct CudaSource {
  const char* path;  // as the files include each other: "rope/kernel_types.h"
  const char* text;
};

extern const CudaSource kCudaSources[];
extern const size_t kCudaSourceCount;
extern const char kCudaSourceDigest[];  // of all device files and of the code that writes the variants' text

}  // namespace ropewalk
