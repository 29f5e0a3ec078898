// NVRTC, NVIDIA's run-time compiler: found where it may lie, opened when something must be compiled.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "backends/cuda/plan.h"
#include "base/status.h"

namespace ropewalk {

struct NvrtcFile {
  std::string path;
  std::string identity;  // "libnvrtc.so.13.0.88 109304232": name and size; told without opening it (2 to 11 ms)
};

// The library that OpenNvrtc would open. Once one is found it stays; until then each call looks again.
Status LocateNvrtc(NvrtcFile* file);

struct Nvrtc {
  NvrtcFile file;
  int major = 0, minor = 0;
  std::vector<int> archs;  // that it compiles for: 80, 90, ..
};

// Opens it and checks its version.
Status OpenNvrtc(const Nvrtc** nvrtc);
std::string NvrtcText(const Nvrtc& nvrtc);  // "NVRTC 13.0 (/usr/local/cuda/lib64/libnvrtc.so.13.0.88)"

// The architecture to compile for: "sm_90a" for compute capability 9.0. A device newer than NVRTC gets the nearest one
// that it runs ("sm_120" for 12.1).
Status ChooseArch(const Nvrtc& nvrtc, const CudaDevice& device, std::string* arch);
// "sm_90a" for 9.0, "sm_86" for 8.6: from 9.0 on the instructions of that architecture alone are allowed.
std::string ExactArch(const CudaDevice& device);
// `90` of "sm_90a"; 0 if it is no such name.
int ArchNumber(const std::string& arch);
// Whether code for `arch` runs on the device: its own, and without the suffix a lower minor version's.
bool ArchServes(const std::string& arch, const CudaDevice& device);

struct Compilation {
  std::string cubin;
  std::string log;  // "" if there was nothing to say; with `verbose`, ptxas's registers and spills
  double milliseconds = 0;
};
// Compiles `source`, which may include the embedded device files. A failure's text holds the compiler's.
Status CompileCuda(const Nvrtc& nvrtc, const std::string& source, const std::string& arch, bool verbose,
                   Compilation* out);
// All options but the architecture, as part of a kernel's identity.
std::string CompileOptionsText();

// The device files, embedded at build time by cmake/embed.cmake, so that NVRTC needs no include directory.
struct CudaSource {
  const char* path;  // as the files include each other: "rope/kernel_types.h"
  const char* text;
};

extern const CudaSource kCudaSources[];
extern const size_t kCudaSourceCount;
extern const char kCudaSourceDigest[];  // of all device files and of the code that writes the variants' text

}  // namespace ropewalk
