// Memory of a CUDA device for the runner, through the driver that the backend has opened.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include "backends/cuda/context.h"
#include "base/text.h"
#include "conformance/memory.h"

namespace ropewalk {
namespace {

class Cuda final : public DeviceMemory {
 public:
  explicit Cuda(int ordinal) : driver_(GetCudaDriver()), ordinal_(ordinal) {
    // Only the tests free device memory, so the backend does not know the call.
    if (void* library = dlopen(driver_.path.c_str(), RTLD_NOW)) {
      free_ = reinterpret_cast<cu::Result (*)(cu::DevicePtr)>(dlsym(library, "cuMemFree_v2"));
    }
  }

  DLDevice device() const override { return {kDLCUDA, ordinal_}; }
  Status Allocate(size_t bytes, void** out) override {
    return Within([&]() -> Status {
      cu::DevicePtr pointer = 0;
      ROPEWALK_TRY(driver_.Check(driver_.MemAlloc(&pointer, bytes ? bytes : 1), "cuMemAlloc"));
      *out = reinterpret_cast<void*>(pointer);
      return {};
    });
  }
  void Free(void* memory) override {
    (void)Within([&]() -> Status {
      return free_ ? driver_.Check(free_(reinterpret_cast<cu::DevicePtr>(memory)), "cuMemFree") : Status();
    });
  }
  Status CopyIn(void* device, const void* host, size_t bytes) override {
    if (bytes == 0) return {};
    return Within([&]() -> Status {
      ROPEWALK_TRY(driver_.Check(driver_.MemcpyHtoDAsync(reinterpret_cast<cu::DevicePtr>(device), host, bytes, nullptr),
                                 "cuMemcpyHtoDAsync"));
      return driver_.Check(driver_.StreamSynchronize(nullptr), "cuStreamSynchronize");
    });
  }
  Status CopyOut(void* host, const void* device, size_t bytes) override {
    if (bytes == 0) return {};
    return Within([&]() -> Status {
      ROPEWALK_TRY(driver_.Check(driver_.MemcpyDtoHAsync(host, reinterpret_cast<cu::DevicePtr>(device), bytes, nullptr),
                                 "cuMemcpyDtoHAsync"));
      return driver_.Check(driver_.StreamSynchronize(nullptr), "cuStreamSynchronize");
    });
  }
  Status Synchronize() override {
    return Within([&]() -> Status { return driver_.Check(driver_.CtxSynchronize(), "cuCtxSynchronize"); });
  }

 private:
  template <class Body>
  Status Within(const Body& body) {
    if (!driver_.status.ok()) return driver_.status;
    CudaContextScope scope;
    ROPEWALK_TRY(scope.Enter(driver_, ordinal_));
    return body();
  }

  const CudaDriver& driver_;
  int ordinal_;
  cu::Result (*free_)(cu::DevicePtr) = nullptr;
};

}  // namespace

DeviceMemory& CudaMemory() {
  static Cuda cuda(0);
  return cuda;
}

}  // namespace ropewalk
