// SPDX-License-Identifier: Apache-2.0
#include "backends/intel/level_zero/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

#include "backends/driver_library.h"
#include "base/text.h"

namespace ropewalk {
namespace {

const char* ResultName(ze::Result result) {
  switch (result) {
    case 0x70000001: return "ZE_RESULT_ERROR_DEVICE_LOST";
    case 0x70000002: return "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY";
    case 0x70000003: return "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY";
    case 0x70000004: return "ZE_RESULT_ERROR_MODULE_BUILD_FAILURE";
    case 0x70000005: return "ZE_RESULT_ERROR_MODULE_LINK_FAILURE";
    case 0x70010000: return "ZE_RESULT_ERROR_INSUFFICIENT_PERMISSIONS";
    case 0x70010001: return "ZE_RESULT_ERROR_NOT_AVAILABLE";
    case 0x70020000: return "ZE_RESULT_ERROR_DEPENDENCY_UNAVAILABLE";
    case 0x78000001: return "ZE_RESULT_ERROR_UNINITIALIZED";
    case 0x78000002: return "ZE_RESULT_ERROR_UNSUPPORTED_VERSION";
    case 0x78000003: return "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE";
    case 0x78000004: return "ZE_RESULT_ERROR_INVALID_ARGUMENT";
    case 0x78000005: return "ZE_RESULT_ERROR_INVALID_NULL_HANDLE";
    case 0x78000007: return "ZE_RESULT_ERROR_INVALID_NULL_POINTER";
    case 0x78000008: return "ZE_RESULT_ERROR_INVALID_SIZE";
    case 0x78000009: return "ZE_RESULT_ERROR_UNSUPPORTED_SIZE";
    case 0x7800000f: return "ZE_RESULT_ERROR_INVALID_NATIVE_BINARY";
    case 0x78000011: return "ZE_RESULT_ERROR_INVALID_KERNEL_NAME";
    case 0x78000013: return "ZE_RESULT_ERROR_INVALID_GROUP_SIZE_DIMENSION";
    case 0x78000015: return "ZE_RESULT_ERROR_INVALID_KERNEL_ARGUMENT_INDEX";
    case 0x78000016: return "ZE_RESULT_ERROR_INVALID_KERNEL_ARGUMENT_SIZE";
    case 0x78000018: return "ZE_RESULT_ERROR_INVALID_MODULE_UNLINKED";
    case 0x78000019: return "ZE_RESULT_ERROR_INVALID_COMMAND_LIST_TYPE";
    default: return nullptr;
  }
}

}  // namespace

Status DescribeLevelZeroDevice(const LevelZeroDriver& driver, ze::Driver owner, ze::Device handle,
                               LevelZeroDevice* out) {
  ze::DeviceProperties properties{};
  ROPEWALK_TRY(driver.Check(driver.DeviceGetProperties(handle, &properties), "zeDeviceGetProperties"));
  ze::ComputeProperties compute{};
  ROPEWALK_TRY(driver.Check(driver.DeviceGetComputeProperties(handle, &compute), "zeDeviceGetComputeProperties"));
  properties.name[sizeof(properties.name) - 1] = '\0';
  *out = {owner, handle, properties.name, {}, 0, ""};
  if (properties.type != ze::kDeviceTypeGpu) return {};
  out->properties.threads = static_cast<int>(properties.threads_per_eu * properties.eus_per_subslice *
                                             properties.subslices_per_slice * properties.slices);
  constexpr uint32_t kWide = 16;  // lanes of an instruction, from PVC and Xe2 on
  out->properties.register_bytes = properties.simd_width >= kWide ? 64 : 32;
  // 0: a driver that does not say; it then refuses what is too large.
  if (compute.most_in_group) {
    out->properties.max_local = static_cast<int>(std::min(compute.most_in_group, compute.most_x));
  }
  const uint32_t sizes = std::min<uint32_t>(compute.sub_group_sizes_count, std::size(compute.sub_group_sizes));
  const uint32_t* end = compute.sub_group_sizes + sizes;
  if (sizes && std::find(static_cast<const uint32_t*>(compute.sub_group_sizes), end, ROPE_SUB_GROUP) == end) {
    std::string known;
    for (const uint32_t* size = compute.sub_group_sizes; size != end; ++size) {
      Append(&known, Text(known.empty() ? "" : ", ", *size));
    }
    out->unfit = Text("has sub-groups of ", known, ", but ", ROPE_SUB_GROUP, " is needed");
  }
  ze::ModuleProperties modules{};
  ROPEWALK_TRY(driver.Check(driver.DeviceGetModuleProperties(handle, &modules), "zeDeviceGetModuleProperties"));
  if (!(modules.flags & ze::kModuleFloat16)) out->unfit = "has no 16-bit floats, which are needed";
  if (const uint32_t version = modules.spirv_version; version < (1u << 16 | 2)) {
    out->unfit = version ? Text("takes SPIR-V ", version >> 16, ".", version & 0xffff, ", but 1.2 is needed")
                         : Text("takes no SPIR-V");
  }
  uint32_t count = 0;
  ROPEWALK_TRY(
      driver.Check(driver.DeviceGetQueueGroups(handle, &count, nullptr), "zeDeviceGetCommandQueueGroupProperties"));
  std::vector<ze::QueueGroupProperties> groups(count, ze::QueueGroupProperties{});
  ROPEWALK_TRY(driver.Check(driver.DeviceGetQueueGroups(handle, &count, groups.data()),
                            "zeDeviceGetCommandQueueGroupProperties"));
  const auto computes =
      std::ranges::find_if(groups, [](const auto& group) { return group.flags & ze::kQueueGroupCompute; });
  if (computes == groups.end()) out->unfit = "has no queue for computing";
  out->compute_group = static_cast<uint32_t>(computes - groups.begin());
  return {};
}

namespace {

Status Load(LevelZeroDriver* driver) {
  std::string why;
  driver->remedy = "install Intel's GPU driver and the Level Zero loader (apt-get install libze1 intel-opencl-icd)";
  void* library = OpenLibrary("ROPEWALK_LIBZE_LOADER", "libze_loader.so.1", nullptr, &driver->path, &why);
  if (!library) return Status::Unavailable(why);
#define ROPEWALK_FIND(name, symbol, ...) \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, symbol));
  ROPEWALK_LEVEL_ZERO_OPTIONAL(ROPEWALK_FIND)
#undef ROPEWALK_FIND
#define ROPEWALK_FIND(name, symbol, ...)                                           \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, symbol)); \
  if (!driver->name && why.empty()) why = symbol;
  ROPEWALK_LEVEL_ZERO_FUNCTIONS(ROPEWALK_FIND)
#undef ROPEWALK_FIND
  if (!why.empty()) return Status::Unavailable(Text(driver->path, " is too old: it has no ", why));
  const auto tell = [&](const Status& status) {  // what the loader says, after its path instead of "rope: "
    return Status::Unavailable(Text(driver->path, ": ", status.text().substr(sizeof("rope: ") - 1)));
  };
  if (const Status status = driver->Check(driver->Init(ze::kInitGpuOnly), "zeInit"); !status.ok()) {
    driver->remedy = "install Intel's GPU driver, and check that this user may open /dev/dri/renderD* (group render)";
    return tell(status);
  }
  uint32_t count = 0;
  if (const Status status = driver->Check(driver->DriverGet(&count, nullptr), "zeDriverGet"); !status.ok()) {
    return tell(status);
  }
  std::vector<ze::Driver> drivers(count);
  if (const Status status = driver->Check(driver->DriverGet(&count, drivers.data()), "zeDriverGet"); !status.ok()) {
    return tell(status);
  }
  for (ze::Driver handle : drivers) {
    if (!driver->version && driver->DriverGetApiVersion(handle, &driver->version) != ze::kSuccess) driver->version = 0;
    uint32_t devices = 0;
    ROPEWALK_TRY(driver->Check(driver->DeviceGet(handle, &devices, nullptr), "zeDeviceGet"));
    std::vector<ze::Device> handles(devices);
    ROPEWALK_TRY(driver->Check(driver->DeviceGet(handle, &devices, handles.data()), "zeDeviceGet"));
    for (ze::Device device : handles) {
      LevelZeroDevice known;
      ROPEWALK_TRY(DescribeLevelZeroDevice(*driver, handle, device, &known));
      if (known.properties.threads) driver->devices.push_back(std::move(known));
    }
  }
  if (driver->devices.empty()) return Status::Unavailable(Text(driver->path, " sees no GPU"));
  driver->remedy.clear();
  return {};
}

}  // namespace

Status LevelZeroDriver::Failure(ze::Result result, const char* call, const std::string& context) {
  const char* name = ResultName(result);
  char number[16];
  std::snprintf(number, sizeof(number), "0x%08x", static_cast<unsigned>(result));
  return Status::Driver(Text("rope: ", call, " failed: ", name ? Text(name, " (", number, ")") : number, context));
}

const LevelZeroDriver& GetLevelZeroDriver() { return Once<LevelZeroDriver, Load>::Get(); }
bool LevelZeroDriverWasLoaded() { return Once<LevelZeroDriver, Load>::WasLoaded(); }

}  // namespace ropewalk
