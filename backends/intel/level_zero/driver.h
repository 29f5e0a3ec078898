// libze_loader, opened when first needed, with our own declarations of what we call: building needs no headers of Level
// Zero, and the library loads where there is no driver. tests/intel/level_zero_test.cc holds them to ze_api.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backends/spirv/plan.h"
#include "base/status.h"
#include "base/text.h"

namespace ropewalk {

// Level Zero's ABI, as far as it is used here. Values are those of ze_api.h.
namespace ze {

using Result = uint32_t;
using Driver = struct DriverTag*;
using Device = struct DeviceTag*;
using Context = struct ContextTag*;
using CommandList = struct CommandListTag*;
using Module = struct ModuleTag*;
using BuildLog = struct BuildLogTag*;
using Kernel = struct KernelTag*;
using Event = struct EventTag*;

enum : Result { kSuccess = 0, kModuleBuildFailure = 0x70000004 };
enum : uint32_t { kInitGpuOnly = 1 };
enum : uint32_t { kDeviceTypeGpu = 1 };
enum : uint32_t { kModuleFloat16 = 1 };
enum : uint32_t { kFormatSpirv = 0 };
enum : uint32_t { kQueueSynchronous = 1 };
enum : uint32_t { kQueueGroupCompute = 1 };
enum : uint32_t { kMemoryUnknown = 0, kMemoryHost = 1, kMemoryDevice = 2, kMemoryShared = 3 };
enum : uint32_t {  // kinds of the structs below
  kDeviceProperties = 0x3,
  kComputeProperties = 0x4,
  kModuleProperties = 0x5,
  kQueueGroupProperties = 0x6,
  kContextDesc = 0xd,
  kQueueDesc = 0xe,
  kDeviceMemoryDesc = 0x15,
  kAllocationProperties = 0x17,
  kModuleDesc = 0x1b,
  kKernelDesc = 0x1d,
  kKernelProperties = 0x1e,
};

struct DeviceProperties {
  uint32_t kind = kDeviceProperties;
  void* next = nullptr;
  uint32_t type, vendor, device, flags, subdevice, clock;
  uint64_t most_memory;
  uint32_t hardware_contexts, priorities;
  uint32_t threads_per_eu, simd_width, eus_per_subslice, subslices_per_slice, slices;
  uint64_t timer_resolution;
  uint32_t timestamp_bits, kernel_timestamp_bits;
  uint8_t uuid[16];
  char name[256];
};

struct ComputeProperties {
  uint32_t kind = kComputeProperties;
  void* next = nullptr;
  uint32_t most_in_group, most_x, most_y, most_z, most_groups_x, most_groups_y, most_groups_z, shared_bytes;
  uint32_t sub_group_sizes_count;
  uint32_t sub_group_sizes[8];
};

struct ModuleProperties {
  uint32_t kind = kModuleProperties;
  void* next = nullptr;
  uint32_t spirv_version;  // major << 16 | minor; 0: takes none
  uint32_t flags, float16_flags, float32_flags, float64_flags, most_argument_bytes, printf_bytes;
  uint8_t native_uuid[16];
};

struct QueueGroupProperties {
  uint32_t kind = kQueueGroupProperties;
  void* next = nullptr;
  uint32_t flags;
  size_t most_pattern;
  uint32_t queues;
};

struct ContextDesc {
  uint32_t kind = kContextDesc;
  const void* next = nullptr;
  uint32_t flags = 0;
};

struct QueueDesc {
  uint32_t kind = kQueueDesc;
  const void* next = nullptr;
  uint32_t ordinal = 0, index = 0, flags = 0, mode = 0, priority = 0;
};

struct DeviceMemoryDesc {
  uint32_t kind = kDeviceMemoryDesc;
  const void* next = nullptr;
  uint32_t flags = 0, ordinal = 0;
};

struct AllocationProperties {
  uint32_t kind = kAllocationProperties;
  void* next = nullptr;
  uint32_t type = kMemoryUnknown;
  uint64_t id, page_size;
};

struct ModuleConstants {
  uint32_t count;
  const uint32_t* ids;
  const void** values;
};

struct ModuleDesc {
  uint32_t kind = kModuleDesc;
  const void* next = nullptr;
  uint32_t format = kFormatSpirv;
  size_t size = 0;
  const uint8_t* bytes = nullptr;
  const char* options = nullptr;
  const ModuleConstants* constants = nullptr;
};

struct KernelDesc {
  uint32_t kind = kKernelDesc;
  const void* next = nullptr;
  uint32_t flags = 0;
  const char* name = nullptr;
};

struct KernelProperties {
  uint32_t kind = kKernelProperties;
  void* next = nullptr;
  uint32_t arguments, required_x, required_y, required_z, required_sub_groups, required_sub_group_size;
  uint32_t most_sub_group_size, most_sub_groups, local_bytes, private_bytes, spilled_bytes;
  uint8_t uuid[32];
};

struct Groups {
  uint32_t x, y, z;
};

}  // namespace ze

// X(name, symbol, parameters..): everything that is called.
#define ROPEWALK_LEVEL_ZERO_FUNCTIONS(X)                                                                              \
  X(Init, "zeInit", uint32_t)                                                                                         \
  X(DriverGet, "zeDriverGet", uint32_t*, ze::Driver*)                                                                 \
  X(DriverGetApiVersion, "zeDriverGetApiVersion", ze::Driver, uint32_t*)                                              \
  X(DeviceGet, "zeDeviceGet", ze::Driver, uint32_t*, ze::Device*)                                                     \
  X(DeviceGetProperties, "zeDeviceGetProperties", ze::Device, ze::DeviceProperties*)                                  \
  X(DeviceGetComputeProperties, "zeDeviceGetComputeProperties", ze::Device, ze::ComputeProperties*)                   \
  X(DeviceGetModuleProperties, "zeDeviceGetModuleProperties", ze::Device, ze::ModuleProperties*)                      \
  X(DeviceGetQueueGroups, "zeDeviceGetCommandQueueGroupProperties", ze::Device, uint32_t*, ze::QueueGroupProperties*) \
  X(ContextCreate, "zeContextCreate", ze::Driver, const ze::ContextDesc*, ze::Context*)                               \
  X(ModuleCreate, "zeModuleCreate", ze::Context, ze::Device, const ze::ModuleDesc*, ze::Module*, ze::BuildLog*)       \
  X(ModuleDestroy, "zeModuleDestroy", ze::Module)                                                                     \
  X(BuildLogGetString, "zeModuleBuildLogGetString", ze::BuildLog, size_t*, char*)                                     \
  X(BuildLogDestroy, "zeModuleBuildLogDestroy", ze::BuildLog)                                                         \
  X(KernelCreate, "zeKernelCreate", ze::Module, const ze::KernelDesc*, ze::Kernel*)                                   \
  X(KernelGetProperties, "zeKernelGetProperties", ze::Kernel, ze::KernelProperties*)                                  \
  X(KernelSetArgumentValue, "zeKernelSetArgumentValue", ze::Kernel, uint32_t, size_t, const void*)                    \
  X(KernelSetGroupSize, "zeKernelSetGroupSize", ze::Kernel, uint32_t, uint32_t, uint32_t)                             \
  X(CommandListCreateImmediate, "zeCommandListCreateImmediate", ze::Context, ze::Device, const ze::QueueDesc*,        \
    ze::CommandList*)                                                                                                 \
  X(AppendLaunchKernel, "zeCommandListAppendLaunchKernel", ze::CommandList, ze::Kernel, const ze::Groups*, ze::Event, \
    uint32_t, ze::Event*)                                                                                             \
  X(AppendMemoryCopy, "zeCommandListAppendMemoryCopy", ze::CommandList, void*, const void*, size_t, ze::Event,        \
    uint32_t, ze::Event*)                                                                                             \
  X(AppendBarrier, "zeCommandListAppendBarrier", ze::CommandList, ze::Event, uint32_t, ze::Event*)                    \
  X(MemAllocDevice, "zeMemAllocDevice", ze::Context, const ze::DeviceMemoryDesc*, size_t, size_t, ze::Device, void**) \
  X(MemGetAllocProperties, "zeMemGetAllocProperties", ze::Context, const void*, ze::AllocationProperties*, ze::Device*)

// What drivers before Level Zero 1.9 (2024) lack; null there.
#define ROPEWALK_LEVEL_ZERO_OPTIONAL(X)                                                 \
  X(CommandListGetDevice, "zeCommandListGetDeviceHandle", ze::CommandList, ze::Device*) \
  X(CommandListGetContext, "zeCommandListGetContextHandle", ze::CommandList, ze::Context*)

struct LevelZeroDevice {
  ze::Driver driver = nullptr;
  ze::Device handle = nullptr;
  std::string name;
  SpirvDevice properties;
  uint32_t compute_group = 0;  // of queues
  std::string unfit;           // why it cannot serve; "" if it can
};

struct LevelZeroDriver {
#define ROPEWALK_MEMBER(name, symbol, ...) ze::Result (*name)(__VA_ARGS__) = nullptr;
  ROPEWALK_LEVEL_ZERO_FUNCTIONS(ROPEWALK_MEMBER)
  ROPEWALK_LEVEL_ZERO_OPTIONAL(ROPEWALK_MEMBER)
#undef ROPEWALK_MEMBER
  Status status;       // why it cannot be used
  std::string remedy;  // and what would help
  std::string path;
  uint32_t version = 0;                  // of the API, of the first driver: major << 16 | minor
  std::vector<LevelZeroDevice> devices;  // the GPUs of all drivers; DLPack's device_id is an index of it

  // OK, or "rope: <call> failed: ZE_RESULT_ERROR_..<context>", put together only then: a launch allocates nothing.
  template <class... Context>
  Status Check(ze::Result result, const char* call, const Context&... context) const {
    return result == ze::kSuccess ? Status() : Failure(result, call, Text(context...));
  }
  static Status Failure(ze::Result result, const char* call, const std::string& context);
};

// What a device is, a sub-device as well.
Status DescribeLevelZeroDevice(const LevelZeroDriver& driver, ze::Driver owner, ze::Device handle,
                               LevelZeroDevice* out);

// Opens the library at the first call: $ROPEWALK_LIBZE_LOADER, one that is loaded already, or the system's.
const LevelZeroDriver& GetLevelZeroDriver();
// Whether GetLevelZeroDriver was called: what only reports must not start the driver.
bool LevelZeroDriverWasLoaded();

}  // namespace ropewalk
