// Memory of a device, as little of it as the runner needs, so that one runner drives every backend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <string_view>

#include "base/status.h"

namespace ropewalk {

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual DLDevice device() const = 0;
  virtual void* stream() const { return nullptr; }        // for ropewalk_rope
  virtual void* sycl_queue() const { return nullptr; }    // likewise
  virtual Status Allocate(size_t bytes, void** out) = 0;  // aligned to 256 bytes at least
  virtual void Free(void* memory) = 0;
  virtual Status CopyIn(void* device, const void* host, size_t bytes) = 0;
  virtual Status CopyOut(void* host, const void* device, size_t bytes) = 0;
  virtual Status Synchronize() = 0;
};

DeviceMemory& HostMemory();
DeviceMemory& CudaMemory();       // of cuda:0
DeviceMemory& OpenClMemory();     // of opencl:0, with a queue
bool OpenClWorksOnHost();         // opencl:0 takes tensors on the CPU
DeviceMemory& LevelZeroMemory();  // of xpu:0, without SYCL
// The memory that a backend's tensors lie in: "cpu", "cpu:avx2", "cuda", ..
DeviceMemory& MemoryOf(std::string_view backend);

}  // namespace ropewalk
