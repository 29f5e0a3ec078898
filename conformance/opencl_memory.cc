// Shared virtual memory of an OpenCL device for the runner, in a context and with a queue such as a caller's would be.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include "backends/opencl/library.h"
#include "base/text.h"
#include "conformance/memory.h"

namespace ropewalk {
namespace {

class OpenCl final : public DeviceMemory {
 public:
  OpenCl() : library_(GetOpenCl()) {
    if (!library_.status.ok()) return;
    // Only the tests free memory, so the backend does not know the call.
    if (void* library = dlopen(library_.path.c_str(), RTLD_NOW)) {
      free_ = reinterpret_cast<void (*)(cl::Context, void*)>(dlsym(library, "clSVMFree"));
    }
    const OpenClDevice& device = library_.devices.front();
    cl::Int result = cl::kSuccess;
    context_ = library_.CreateContext(nullptr, 1, &device.handle, nullptr, nullptr, &result);
    if (result == cl::kSuccess) queue_ = library_.CreateQueue(context_, device.handle, nullptr, &result);
  }

  DLDevice device() const override { return {kDLOpenCL, 0}; }
  void* stream() const override { return queue_; }
  Status Allocate(size_t bytes, void** out) override {
    if (!queue_) return library_.status.ok() ? Status::Driver("OpenCL gave no context or queue") : library_.status;
    *out = library_.SvmAlloc(context_, cl::kReadWrite, bytes ? bytes : 1, 0);
    // Aligned for the largest type of OpenCL, which is enough for the kernel's accesses.
    return *out ? Status() : Status::Driver(Text("clSVMAlloc failed for ", bytes, " bytes"));
  }
  void Free(void* memory) override {
    if (free_) free_(context_, memory);
  }
  Status CopyIn(void* device, const void* host, size_t bytes) override { return Copy(device, host, bytes); }
  Status CopyOut(void* host, const void* device, size_t bytes) override { return Copy(host, device, bytes); }
  Status Synchronize() override { return library_.Check(library_.Finish(queue_), "clFinish"); }

 private:
  Status Copy(void* to, const void* from, size_t bytes) {
    if (bytes == 0) return {};
    return library_.Check(library_.EnqueueSvmMemcpy(queue_, 1, to, from, bytes, 0, nullptr, nullptr),
                          "clEnqueueSVMMemcpy");
  }

  const OpenClLibrary& library_;
  cl::Context context_ = nullptr;
  cl::Queue queue_ = nullptr;
  void (*free_)(cl::Context, void*) = nullptr;
};

}  // namespace

DeviceMemory& OpenClMemory() {
  static OpenCl opencl;
  return opencl;
}

bool OpenClWorksOnHost() {
  const OpenClLibrary& library = GetOpenCl();
  return library.status.ok() && library.devices.front().system_memory;
}

}  // namespace ropewalk
