// Bundles: kernels compiled ahead for machines without NVRTC. `ropewalk compile` writes a directory with one file for
// each architecture; $ROPEWALK_BUNDLE names such a directory or file, and a directory `bundles` beside the library is
// used too.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cuda/cache.h"
#include "backends/cuda/nvrtc.h"
#include "backends/cuda/plan.h"
#include "base/status.h"

namespace ropewalk {

// ---------------------------------------------------------------------------------------------------------------------
// Reading

// What a bundle holds, by the digest of each kernel's identity. The views point into the bundle's bytes.
struct BundleContent {
  std::string arch;
  std::map<Digest, std::string_view> kernels;
};
inline constexpr std::string_view kBundleMagic = "RWBUNDL1";
// "" if the bytes are a bundle that this library can use, else why not.
std::string ParseBundle(std::string_view bytes, BundleContent* content);

// False if no bundle of this process has the variant for this device.
bool FindInBundles(const RopeCudaKey& key, const CudaDevice& device, Cubin* out);
// Whether some bundle has kernels that run on the device.
bool BundlesServe(const CudaDevice& device);
// Why bundles do not help: "the bundle PATH has kernels for sm_80, but the GPU is sm_90", "no bundle was found: ..".
std::string BundleRefusals(const CudaDevice& device);
// The bundles in use, for doctor: "PATH (sm_90a, 412 kernels)"; refused ones with the reason. Empty if there are none.
std::vector<std::string> BundleTexts();

// ---------------------------------------------------------------------------------------------------------------------
// Writing, for `ropewalk compile`

// The architectures that bundles are made for: "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a".
std::vector<std::string> BundleArchs();
// The devices of such an architecture, by their number of multiprocessors, which the choice of a kernel depends on.
// Refuses other names.
Status BundleDevices(const std::string& arch, std::vector<CudaDevice>* devices);

// Appends to `keys` the variants that `call` needs on the devices with 1 to `max_tokens` tokens, unless they are there.
// The call has at least two tokens. Its memory is not touched; its alignments and strides count.
Status CollectBundleKeys(const RopeCall& call, const std::vector<CudaDevice>& devices, int64_t max_tokens,
                         std::vector<RopeCudaKey>* keys);

struct BundleReport {
  std::string path;  // of the file
  size_t kernels = 0;
  size_t bytes = 0;
  double milliseconds = 0;  // of compiling
};

// Compiles the variants for `arch` and writes DIRECTORY/ropewalk-ARCH.bundle. `progress` may be empty;
// it is called before each kernel, from any of the threads that compile, one at a time.
Status WriteBundle(const std::vector<RopeCudaKey>& keys, const std::string& arch, const std::string& directory,
                   const std::function<void(size_t done, const RopeCudaKey& key)>& progress, BundleReport* report);

}  // namespace ropewalk
