// A stand-in for libropewalk_sycl*.so: queues are the tests' own structs, memory is the host's, nothing is executed,
// launches are recorded (fake_intel.h).
// SPDX-License-Identifier: Apache-2.0
#include "tests/stand_ins/fake_intel.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ropewalk {
namespace {

FakeSycl& TheFake() {
  static FakeSycl* const fake = new FakeSycl;
  return *fake;
}

int Refused(const void* queue, const char* function, char* error) {
  if (std::strcmp(static_cast<const FakeSyclQueue*>(queue)->refuses, function) != 0) return 0;
  std::snprintf(error, kSyclErrorBytes, "the test wants %s to fail", function);
  return -1;
}

int Find(const void* queue, void** entry, const SyclQueueInfo** info, char* error) {
  *entry = const_cast<void*>(queue);
  *info = &static_cast<const FakeSyclQueue*>(queue)->info;
  return Refused(queue, "find", error);
}
int Wrap(void* entry, void*, void* kernel, void** out, char* error) {
  ++TheFake().wrapped;
  *out = kernel;
  return Refused(entry, "wrap", error);
}
int Launch(void* entry, const void* kernel, const SyclArgument* arguments, uint32_t count, const uint32_t* groups,
           uint32_t local, char* error) {
  if (Refused(entry, "launch", error)) return -1;
  FakeSyclLaunch launch = {entry, kernel, {groups[0], groups[1], groups[2]}, local, {}};
  for (uint32_t i = 0; i < count; ++i) {
    launch.arguments.emplace_back(static_cast<const char*>(arguments[i].data), arguments[i].bytes);
  }
  TheFake().launches.push_back(std::move(launch));
  return 0;
}
int Allocate(void* entry, size_t bytes, void** out, char* error) {
  *out = std::malloc(bytes);
  return Refused(entry, "allocate", error);
}
int Copy(void*, void* to, const void* from, size_t bytes, char*) {
  std::memcpy(to, from, bytes);
  return 0;
}
int MemoryOf(void* entry, const void*, int32_t* memory, char*) {
  *memory = static_cast<const FakeSyclQueue*>(entry)->memory;
  return 0;
}
int Wait(char*) { return 0; }

constexpr SyclShim kShim = {kSyclShimVersion, "libsycl.so.fake", Find, Wrap, Launch, Allocate, Copy, MemoryOf, Wait};

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;  // NOLINT: a library of C functions

extern "C" {
__attribute__((visibility("default"))) FakeSycl* fake_sycl() { return &TheFake(); }
__attribute__((visibility("default"))) const SyclShim* ropewalk_sycl_shim() { return &kShim; }
}
