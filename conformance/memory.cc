// SPDX-License-Identifier: Apache-2.0
#include "conformance/memory.h"

#include <cstdlib>
#include <cstring>

#include "base/text.h"

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

}  // namespace

DeviceMemory& HostMemory() {
  static Host& host = *new Host;  // tests call in destructors of static objects, when others are gone
  return host;
}

DeviceMemory& MemoryOf(std::string_view backend) {
  const std::string_view name = backend.substr(0, backend.find(':'));
  if (name == "cuda") return CudaMemory();
  if (name == "intel") return LevelZeroMemory();
  if (name == "opencl" && !OpenClWorksOnHost()) return OpenClMemory();
  return HostMemory();
}

}  // namespace ropewalk
