// A SYCL device for tests, behind a C ABI: tests/stand_ins/sycl_device.cc is a library of its own, compiled against
// SYCL's headers, so that the tests themselves need none.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace ropewalk {

// A function that fails returns null or false, and its reason is in error().
struct SyclDevice {
  const char* (*error)();
  // The CPU device; null if there is none. Queues live to the end of the process.
  void* (*queue)(bool in_order);
  const char* (*name)(void* queue);
  void* (*allocate)(void* queue, size_t bytes);  // on the device
  void (*free)(void* queue, void* memory);
  bool (*copy)(void* queue, void* to, const void* from, size_t bytes);  // waits
  bool (*wait)(void* queue);
  // Sets every byte, but only after other values many times over; without waiting.
  bool (*fill_late)(void* queue, void* memory, int value, size_t bytes);
};

using SyclDeviceFunction = const SyclDevice*();  // exported as sycl_device

}  // namespace ropewalk
