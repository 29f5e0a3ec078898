// Memory of an Intel GPU for the runner, through the driver that the backend has opened.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include "backends/intel/level_zero/context.h"
#include "base/text.h"
#include "conformance/memory.h"
#include "rope/arguments.h"

namespace ropewalk {
namespace {

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

}  // namespace

DeviceMemory& LevelZeroMemory() {
  static LevelZero memory;
  return memory;
}

}  // namespace ropewalk
