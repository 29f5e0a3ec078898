// SPDX-License-Identifier: Apache-2.0
#include "conformance/memory.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "backends/cuda/context.h"
#include "backends/intel/level_zero/context.h"
#include "backends/opencl/library.h"
#include "base/text.h"
#include "rope/arguments.h"

namespace ropewalk {
namespace {

class Host final : public DeviceMemory {
 public:
  DLDevice device() const override { return {kDLCPU, 0}; }
  Status Allocate(size_t bytes, void** out) override {
    constexpr size_t kAlignment = 256;
    *out = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    return *out ? Status() : Status::Driver(Text("the host has no ", bytes, " bytes left"));
  }
  void Free(void* memory) override { std::free(memory); }
  Status CopyIn(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
    return {};
  }
  Status CopyOut(void* host, const void* device, size_t bytes) override {
    std::memcpy(host, device, bytes);
    return {};
  }
  Status Synchronize() override { return {}; }
};

// Memory of a CUDA device for the runner, through the driver that the backend has opened.
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

// Memory of an Intel GPU for the runner, through the driver that the backend has opened.
class LevelZero final : public DeviceMemory {
 public:
  LevelZero() {
    const LevelZeroDriver& driver = GetLevelZeroDriver();
    opened_ = driver.status;
    if (opened_.ok()) opened_ = EnterLevelZero(driver, 0, nullptr, &context_);
    // Only the tests free device memory, so the backend does not know the call.
    if (void* library = opened_.ok() ? dlopen(driver.path.c_str(), RTLD_NOW) : nullptr) {
      free_ = reinterpret_cast<ze::Result (*)(ze::Context, void*)>(dlsym(library, "zeMemFree"));
    }
  }

  DLDevice device() const override { return {static_cast<DLDeviceType>(kDlOneApi), 0}; }
  Status Allocate(size_t bytes, void** out) override {
    ROPEWALK_TRY(opened_);
    const ze::DeviceMemoryDesc desc;
    return context_->driver.Check(context_->driver.MemAllocDevice(context_->handle, &desc, bytes ? bytes : 1, 256,
                                                                  context_->device().handle, out),
                                  "zeMemAllocDevice", Text(" for ", bytes, " bytes"));
  }
  void Free(void* memory) override {
    if (free_ && memory) free_(context_->handle, memory);
  }
  Status CopyIn(void* device, const void* host, size_t bytes) override {
    ROPEWALK_TRY(opened_);
    return bytes ? context_->CopyIn(device, host, bytes) : Status();
  }
  Status CopyOut(void* host, const void* device, size_t bytes) override {
    ROPEWALK_TRY(opened_);
    return bytes ? context_->CopyOut(host, device, bytes) : Status();
  }
  Status Synchronize() override { return {}; }  // without a stream a call returns when the work is done

 private:
  Status opened_;
  LevelZeroContext* context_ = nullptr;
  ze::Result (*free_)(ze::Context, void*) = nullptr;
};

// Shared virtual memory of an OpenCL device for the runner, in a context and with a queue such as a caller's would be.
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

DeviceMemory& HostMemory() {
  static Host& host = *new Host;  // tests call in destructors of static objects, when others are gone
  return host;
}

DeviceMemory& CudaMemory() {
  static Cuda cuda(0);
  return cuda;
}

DeviceMemory& LevelZeroMemory() {
  static LevelZero memory;
  return memory;
}

DeviceMemory& OpenClMemory() {
  static OpenCl opencl;
  return opencl;
}

bool OpenClWorksOnHost() {
  const OpenClLibrary& library = GetOpenCl();
  return library.status.ok() && library.devices.front().system_memory;
}

DeviceMemory& MemoryOf(std::string_view backend) {
  const std::string_view name = backend.substr(0, backend.find(':'));
  if (name == "cuda") return CudaMemory();
  if (name == "intel") return LevelZeroMemory();
  if (name == "opencl" && !OpenClWorksOnHost()) return OpenClMemory();
  return HostMemory();
}

}  // namespace ropewalk
