// What the stand-ins for Intel's libraries have seen, and what a test may do to them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backends/intel/sycl/shim.h"

namespace ropewalk {

// Of fake_libze.cc, a stand-in for libze_loader. Devices and settings by environment: FAKE_ZE_DEVICES (1),
// FAKE_ZE_SUB_GROUPS ("8 16 32"), FAKE_ZE_LACKS ("float16", "spirv"), FAKE_ZE_REFUSE (the name of a function that
// fails).
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

// Of fake_sycl_shim.cc, a stand-in for the shims of libsycl: the queues that it takes, and what it has seen. A test
// says what the queues are. With it a queue of Level Zero leads to fake_libze.cc, and what no machine here has is met.
struct FakeSyclQueue {
  SyclQueueInfo info;
  int32_t memory = kSyclDevice;  // what every pointer is said to be
  const char* refuses = "";      // the function that fails: "find", "wrap", "launch", "allocate"
};

struct FakeSyclLaunch {
  const void* queue;
  const void* kernel;  // of the backend, as it was wrapped
  uint32_t groups[3], local;
  std::vector<std::string> arguments;  // the bytes of each
};

struct FakeSycl {
  std::vector<FakeSyclLaunch> launches;
  int wrapped = 0;
};

}  // namespace ropewalk
