// Compiled kernels (cubins) by content: in memory, from bundles, from the disk, or compiled now. A cubin's identity is
// everything that decides its bytes, as text; files are named by a digest of it and hold the whole of it, so that a
// stale or foreign file simply does not match. Whatever is wrong with a file, the next source serves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cuda/nvrtc.h"
#include "backends/cuda/plan.h"
#include "base/files.h"
#include "base/status.h"

namespace ropewalk {

struct Cubin {
  std::string bytes;
  std::string source;  // "bundle PATH", "disk PATH", "compiled by NVRTC 13.0 (PATH) in 38 ms"
};

// The cubin of this variant for this device. Threads that ask for the same variant wait for one compilation. `no_disk`:
// do not take it from the disk, because the driver refused that file.
Status GetCubin(const RopeCudaKey& key, const CudaDevice& device, bool no_disk, std::shared_ptr<const Cubin>* out);
// Where GetCubin would take it from: "bundle PATH", "disk PATH", "would be compiled now by NVRTC 13.0 (PATH)".
Status FindCubinSource(const RopeCudaKey& key, const CudaDevice& device, std::string* source);

// The most bytes of stack that a function of a cubin takes; 0 also if it cannot be read. NVRTC's log tells the same,
// but nothing where NVRTC had the cubin in a cache of its own.
int CubinStackBytes(std::string_view cubin);
// Compiles a variant for an architecture. A limit of registers that makes it spill is given up, but for
// RopeCudaKey::at_once.
Status CompileRopeCuda(const Nvrtc& nvrtc, const RopeCudaKey& key, const std::string& arch, bool verbose,
                       Compilation* out);

// Where cubins are kept: $ROPEWALK_CACHE_DIR (empty: nowhere), $XDG_CACHE_HOME/ropewalk, ~/.cache/ropewalk; "" if
// nowhere.
std::string DiskCacheDirectory();
// One sentence on it for doctor: "/root/.cache/ropewalk", or why nothing is written there.
std::string DiskCacheText();

// ---------------------------------------------------------------------------------------------------------------------
// Identities and files, shared with bundles

// All but the compiler: versions, options, architecture, the variant's text.
std::string KernelIdentity(const RopeCudaKey& key, const std::string& arch);

// A file of ours: magic, sizes, checksum, identity, payload.
std::string Sealed(std::string_view magic, std::string_view identity, std::string_view payload);
// False if the bytes are cut short, changed, or not such a file.
bool Unseal(std::string_view bytes, std::string_view magic, std::string_view* identity, std::string_view* payload);

}  // namespace ropewalk
