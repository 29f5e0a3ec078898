// What tests/stand_ins/fake_sycl_shim.cc, a stand-in for the shims of libsycl, has seen, and the queues that it takes:
// a test says what they are. With it a queue of Level Zero leads to tests/stand_ins/fake_libze.cc, and what no machine
// here has is met.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backends/intel/sycl/shim.h"

namespace ropewalk {

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
