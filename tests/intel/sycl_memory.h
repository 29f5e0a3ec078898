// A SYCL device and memory on it, for the tests and bench/sycl_launch.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <stdlib.h>

#include <filesystem>
#include <string>

#include "backends/spirv/plan.h"
#include "conformance/memory.h"
#include "rope/arguments.h"
#include "tests/stand_ins/sycl_device.h"

namespace ropewalk {

inline std::string missing;  // why there is no device

inline const SyclDevice* Device() {
  static const SyclDevice* const device = []() -> const SyclDevice* {
    // Intel's CPU device alone, wherever else OpenCL is installed.
    if (std::filesystem::exists(ROPEWALK_INTEL_OPENCL)) {
      setenv("OCL_ICD_VENDORS", ROPEWALK_INTEL_OPENCL, 0);    // as ocl-icd wants it,
      setenv("OCL_ICD_FILENAMES", ROPEWALK_INTEL_OPENCL, 0);  // and the loader that comes with the packages
    }
    if (*RopeSpirvMissing()) return missing = RopeSpirvMissing(), nullptr;
    void* library = dlopen(ROPEWALK_SYCL_DEVICE, RTLD_NOW);
    if (!library) return missing = dlerror(), nullptr;
    auto* function = reinterpret_cast<SyclDeviceFunction*>(dlsym(library, "sycl_device"));
    const SyclDevice* found = function();
    void* queue = found->queue(true);
    if (!queue) return missing = found->error(), nullptr;
    if (std::string(found->name(queue)).find("pthread-") == 0) return missing = "PoCL takes no SPIR-V", nullptr;
    setenv("ROPEWALK_LIBSYCL_SHIM", ROPEWALK_SYCL_SHIM, 1);
    return found;
  }();
  return device;
}

class SyclTestMemory final : public DeviceMemory {
 public:
  explicit SyclTestMemory(bool in_order = true) : queue_(Device()->queue(in_order)) {}
  DLDevice device() const override { return {static_cast<DLDeviceType>(kDlOneApi), 0}; }
  void* sycl_queue() const override { return queue_; }
  Status Allocate(size_t bytes, void** out) override {
    *out = Device()->allocate(queue_, bytes);
    return *out ? Status() : Status::Driver(Device()->error());
  }
  void Free(void* memory) override { Device()->free(queue_, memory); }
  Status CopyIn(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }
  Status CopyOut(void* to, const void* from, size_t bytes) override { return Copy(to, from, bytes); }
  Status Synchronize() override { return Device()->wait(queue_) ? Status() : Status::Driver(Device()->error()); }

 private:
  Status Copy(void* to, const void* from, size_t bytes) {
    if (bytes == 0 || Device()->copy(queue_, to, from, bytes)) return {};
    return Status::Driver(Device()->error());
  }
  void* queue_;
};

}  // namespace ropewalk
