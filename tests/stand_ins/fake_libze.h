// What tests/stand_ins/fake_libze.cc, a stand-in for libze_loader, has seen, and what a test may do to it. Devices and
// settings by environment: FAKE_ZE_DEVICES (1), FAKE_ZE_SUB_GROUPS ("8 16 32"), FAKE_ZE_LACKS ("float16", "spirv"),
// FAKE_ZE_REFUSE (the name of a function that fails).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ropewalk {

struct FakeZeLaunch {
  void* list = nullptr;
  void* context = nullptr;  // of the module
  std::string function;
  int barriers = 0;  // appended to any list before it
  std::vector<uint32_t> constants;
  std::string options;
  uint32_t groups[3] = {}, group_size[3] = {};
  std::vector<std::string> arguments;  // the bytes of each; "" for a null value
};

struct FakeZe {
  virtual ~FakeZe() = default;
  virtual std::vector<FakeZeLaunch> launches() = 0;
  virtual int modules() = 0;      // made so far
  virtual int allocations() = 0;  // of device memory so far
  virtual void* new_context() = 0;
  virtual void* new_list(void* context, int device) = 0;
  // Memory of a context and a device (-1: shared by all).
  virtual void* allocate(void* context, int device, size_t bytes) = 0;
  virtual void* own_context() = 0;  // the last that was made through zeContextCreate
};

}  // namespace ropewalk
