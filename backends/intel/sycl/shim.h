// What libropewalk asks of SYCL, as a C ABI: the few calls that need sycl::queue are compiled into a small library of
// their own (shim.cc), one for each version of libsycl, which is opened when a queue is handed over and not before. No
// function throws; each returns 0, or -1 with the reason in `error` (kSyclErrorBytes of it).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace ropewalk {

inline constexpr size_t kSyclErrorBytes = 1024;
inline constexpr uint32_t kSyclShimVersion = 1;  // of this header

enum SyclBackend : int32_t { kSyclOther = 0, kSyclOpenCl = 1, kSyclLevelZero = 2 };
enum SyclMemory : int32_t { kSyclUnknown = 0, kSyclHost = 1, kSyclShared = 2, kSyclDevice = 3, kSyclOtherDevice = 4 };

// What a queue is. The handles are those of the queue's backend (cl_context, ze_device_handle_t, ..) and stay valid.
struct SyclQueueInfo {
  int32_t backend;  // SyclBackend
  int32_t in_order;
  void* context;
  void* device;
  char backend_name[32];
  char device_name[128];
};

struct SyclArgument {
  const void* data;
  uint32_t bytes;
  int32_t pointer;  // 1: `data` points at an address in unified shared memory
};

struct SyclShim {
  uint32_t version;
  const char* sycl;  // "libsycl.so.9"
  // The entry of the queue that `queue` points at; it holds a share of the queue, so that equal entries are one queue.
  int (*find)(const void* queue, void** entry, const SyclQueueInfo** info, char* error);
  // A kernel of the queue's backend (cl_kernel; ze_kernel_handle_t and its ze_module_handle_t) as SYCL's.
  int (*wrap)(void* entry, void* module, void* kernel, void** out, char* error);
  // `groups` are those of OpenCL's dimensions 0, 1 and 2, each of `local` work-items in dimension 0. After all that the
  // queue holds, and before all that comes, also if it is not in order.
  int (*launch)(void* entry, const void* kernel, const SyclArgument* arguments, uint32_t count, const uint32_t* groups,
                uint32_t local, char* error);
  int (*allocate)(void* entry, size_t bytes, void** out, char* error);              // on the queue's device
  int (*copy)(void* entry, void* to, const void* from, size_t bytes, char* error);  // waits
  int (*memory_of)(void* entry, const void* pointer, int32_t* memory, char* error);
  int (*wait)(char* error);  // for every queue that a kernel was launched on
};

// What the library exports, as extern "C" ropewalk_sycl_shim.
using SyclShimFunction = const SyclShim*();

}  // namespace ropewalk
