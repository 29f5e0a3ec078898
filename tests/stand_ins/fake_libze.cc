// A stand-in for libze_loader: host memory for device memory, nothing executed, everything recorded (fake_intel.h).
// SPDX-License-Identifier: Apache-2.0
#include "tests/stand_ins/fake_intel.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string_view>
#include <utility>

#include "backends/intel/level_zero/driver.h"

namespace ropewalk {
namespace {

constexpr ze::Result kInvalid = 0x78000004;

struct Context {};
struct Device {
  int ordinal;
};
struct List {
  Context* context;
  Device* device;
};
struct Module {
  Context* context;
  std::vector<uint32_t> constants;
  std::string options;
};
struct Kernel {
  Module* module;
  FakeZeLaunch state;
};
struct Memory {
  size_t bytes;
  Context* context;
  int device;
};

class Fake final : public FakeZe {
 public:
  Fake() {
    const char* count = std::getenv("FAKE_ZE_DEVICES");
    for (int i = 0; i < (count ? std::atoi(count) : 1); ++i) devices.push_back({i});
  }
  std::vector<FakeZeLaunch> launches() override {
    const std::lock_guard lock(mutex);
    return launched;
  }
  int modules() override { return module_count; }
  int allocations() override { return allocation_count; }
  void* new_context() override { return new Context; }
  void* new_list(void* context, int device) override {
    return new List{static_cast<Context*>(context), &devices[static_cast<size_t>(device)]};
  }
  void* allocate(void* context, int device, size_t bytes) override {
    const std::lock_guard lock(mutex);
    constexpr size_t kPage = 65536;  // as a driver would: pages are of one kind
    void* memory = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
    memories[reinterpret_cast<uintptr_t>(memory)] = {bytes, static_cast<Context*>(context), device};
    return memory;
  }
  void* own_context() override { return own; }

  std::mutex mutex;
  std::vector<Device> devices;
  std::vector<FakeZeLaunch> launched;
  std::map<uintptr_t, Memory> memories;
  Context* own = nullptr;
  int module_count = 0, allocation_count = 0, barrier_count = 0;
};

Fake& TheFake() {
  static Fake* const fake = new Fake;
  return *fake;
}

bool Refuses(const char* function) {
  const char* name = std::getenv("FAKE_ZE_REFUSE");
  return name && std::strcmp(name, function) == 0;
}

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;
#define EXPORT extern "C" __attribute__((visibility("default"))) ze::Result

extern "C" __attribute__((visibility("default"))) FakeZe* fake_ze() { return &TheFake(); }

EXPORT zeInit(uint32_t) { return Refuses("zeInit") ? ze::Result{0x78000001} : ze::Result{ze::kSuccess}; }
EXPORT zeDriverGet(uint32_t* count, ze::Driver* drivers) {
  if (drivers) *drivers = reinterpret_cast<ze::Driver>(&TheFake());
  *count = 1;
  return ze::kSuccess;
}
EXPORT zeDriverGetApiVersion(ze::Driver, uint32_t* version) { return *version = (1 << 16) | 9, ze::kSuccess; }
EXPORT zeDeviceGet(ze::Driver, uint32_t* count, ze::Device* devices) {
  Fake& fake = TheFake();
  for (size_t i = 0; devices && i < fake.devices.size(); ++i) {
    devices[i] = reinterpret_cast<ze::Device>(&fake.devices[i]);
  }
  *count = static_cast<uint32_t>(fake.devices.size());
  return ze::kSuccess;
}
EXPORT zeDeviceGetProperties(ze::Device, ze::DeviceProperties* out) {
  out->type = ze::kDeviceTypeGpu;
  out->threads_per_eu = 8, out->eus_per_subslice = 8, out->subslices_per_slice = 4, out->slices = 1;
  out->simd_width = 16;
  std::strcpy(out->name, "Fake GPU");
  return ze::kSuccess;
}
EXPORT zeDeviceGetComputeProperties(ze::Device, ze::ComputeProperties* out) {
  out->most_in_group = out->most_x = 1024;
  const char* sizes = std::getenv("FAKE_ZE_SUB_GROUPS");
  std::istringstream text(sizes ? sizes : "8 16 32");
  out->sub_group_sizes_count = 0;
  for (uint32_t size; text >> size;) out->sub_group_sizes[out->sub_group_sizes_count++] = size;
  return ze::kSuccess;
}
EXPORT zeDeviceGetModuleProperties(ze::Device, ze::ModuleProperties* out) {
  const char* lacks = std::getenv("FAKE_ZE_LACKS");
  out->flags = lacks && std::strstr(lacks, "float16") ? 0 : uint32_t{ze::kModuleFloat16};
  out->spirv_version = lacks && std::strstr(lacks, "spirv") ? 1 << 16 | 1 : 1 << 16 | 2;
  return ze::kSuccess;
}
EXPORT zeDeviceGetCommandQueueGroupProperties(ze::Device, uint32_t* count, ze::QueueGroupProperties* out) {
  if (out) out[0].flags = 2, out[1].flags = 3;  // copies alone; all
  *count = 2;
  return ze::kSuccess;
}
EXPORT zeContextCreate(ze::Driver, const ze::ContextDesc*, ze::Context* out) {
  if (Refuses("zeContextCreate")) return 0x70000002;
  TheFake().own = new Context;
  return *out = reinterpret_cast<ze::Context>(TheFake().own), ze::kSuccess;
}
EXPORT zeModuleCreate(ze::Context context, ze::Device, const ze::ModuleDesc* desc, ze::Module* out, ze::BuildLog* log) {
  *log = reinterpret_cast<ze::BuildLog>(&TheFake());
  if (Refuses("zeModuleCreate")) return ze::kModuleBuildFailure;
  auto* module = new Module{reinterpret_cast<Context*>(context), {}, desc->options};
  for (uint32_t i = 0; i < desc->constants->count; ++i) {
    uint32_t value;
    std::memcpy(&value, desc->constants->values[i], sizeof(value));
    const uint32_t id = desc->constants->ids[i];
    if (id < module->constants.size()) return kInvalid;
    module->constants.resize(id + 1);
    module->constants[id] = value;
  }
  uint32_t magic = 0;
  if (desc->size > sizeof(magic)) std::memcpy(&magic, desc->bytes, sizeof(magic));
  if (magic != 0x07230203 || desc->format != ze::kFormatSpirv) return ze::kModuleBuildFailure;
  const std::lock_guard lock(TheFake().mutex);
  ++TheFake().module_count;
  return *out = reinterpret_cast<ze::Module>(module), ze::kSuccess;
}
EXPORT zeModuleDestroy(ze::Module module) { return delete reinterpret_cast<Module*>(module), ze::kSuccess; }
EXPORT zeModuleBuildLogGetString(ze::BuildLog, size_t* bytes, char* text) {
  const std::string log = Refuses("zeModuleCreate") ? "error: this device has no such instruction\n" : "";
  if (text) std::memcpy(text, log.c_str(), log.size() + 1);
  *bytes = log.size() + 1;
  return ze::kSuccess;
}
EXPORT zeModuleBuildLogDestroy(ze::BuildLog) { return ze::kSuccess; }
EXPORT zeKernelCreate(ze::Module module, const ze::KernelDesc* desc, ze::Kernel* out) {
  constexpr std::pair<const char*, size_t> kKernels[] = {{"rope_kernel", kRopeSpirvPointers},
                                                         {"rope_backward_kernel", kRopeBackwardPointers},
                                                         {"rope_sums_kernel", kRopeSumsPointers}};
  const auto* known = std::ranges::find(kKernels, std::string_view(desc->name), &std::pair<const char*, size_t>::first);
  if (Refuses("zeKernelCreate") || known == std::end(kKernels)) return 0x78000011;
  auto* kernel = new Kernel{reinterpret_cast<Module*>(module), {}};
  kernel->state.function = known->first;
  kernel->state.arguments.resize(known->second + 1);
  return *out = reinterpret_cast<ze::Kernel>(kernel), ze::kSuccess;
}
EXPORT zeKernelGetProperties(ze::Kernel, ze::KernelProperties* out) { return out->spilled_bytes = 0, ze::kSuccess; }
EXPORT zeKernelSetArgumentValue(ze::Kernel handle, uint32_t index, size_t bytes, const void* value) {
  auto* kernel = reinterpret_cast<Kernel*>(handle);
  if (index >= kernel->state.arguments.size()) return 0x78000015;
  std::string& argument = kernel->state.arguments[index];
  argument = value ? std::string(static_cast<const char*>(value), bytes) : "";
  void* pointer;
  if (value && bytes == sizeof(pointer)) {
    std::memcpy(&pointer, value, sizeof(pointer));
    if (!pointer) return kInvalid;  // as the real driver does
  }
  return ze::kSuccess;
}
EXPORT zeKernelSetGroupSize(ze::Kernel handle, uint32_t x, uint32_t y, uint32_t z) {
  auto& size = reinterpret_cast<Kernel*>(handle)->state.group_size;
  size[0] = x, size[1] = y, size[2] = z;
  return ze::kSuccess;
}
EXPORT zeCommandListCreateImmediate(ze::Context context, ze::Device device, const ze::QueueDesc* desc,
                                    ze::CommandList* out) {
  if (desc->mode != ze::kQueueSynchronous || desc->ordinal != 1) return kInvalid;
  auto* list = new List{reinterpret_cast<Context*>(context), reinterpret_cast<Device*>(device)};
  return *out = reinterpret_cast<ze::CommandList>(list), ze::kSuccess;
}
EXPORT zeCommandListAppendLaunchKernel(ze::CommandList list, ze::Kernel handle, const ze::Groups* groups, ze::Event,
                                       uint32_t, ze::Event*) {
  if (Refuses("zeCommandListAppendLaunchKernel")) return 0x70000001;
  const auto* kernel = reinterpret_cast<Kernel*>(handle);
  FakeZeLaunch launch = kernel->state;
  launch.list = list;
  launch.context = kernel->module->context;
  launch.constants = kernel->module->constants;
  launch.options = kernel->module->options;
  launch.groups[0] = groups->x, launch.groups[1] = groups->y, launch.groups[2] = groups->z;
  const std::lock_guard lock(TheFake().mutex);
  launch.barriers = TheFake().barrier_count;
  TheFake().launched.push_back(std::move(launch));
  return ze::kSuccess;
}
EXPORT zeCommandListAppendBarrier(ze::CommandList, ze::Event, uint32_t, ze::Event*) {
  if (Refuses("zeCommandListAppendBarrier")) return 0x70000001;
  const std::lock_guard lock(TheFake().mutex);
  ++TheFake().barrier_count;
  return ze::kSuccess;
}
EXPORT zeCommandListAppendMemoryCopy(ze::CommandList, void* to, const void* from, size_t bytes, ze::Event, uint32_t,
                                     ze::Event*) {
  return std::memcpy(to, from, bytes), ze::kSuccess;
}
EXPORT zeMemAllocDevice(ze::Context context, const ze::DeviceMemoryDesc*, size_t bytes, size_t, ze::Device device,
                        void** out) {
  if (Refuses("zeMemAllocDevice")) return 0x70000003;
  *out = TheFake().allocate(context, reinterpret_cast<Device*>(device)->ordinal, bytes);
  ++TheFake().allocation_count;
  return ze::kSuccess;
}
EXPORT zeMemGetAllocProperties(ze::Context context, const void* pointer, ze::AllocationProperties* out,
                               ze::Device* device) {
  Fake& fake = TheFake();
  const std::lock_guard lock(fake.mutex);
  auto it = fake.memories.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  out->type = ze::kMemoryUnknown;
  if (it == fake.memories.begin()) return ze::kSuccess;
  --it;
  const Memory& memory = it->second;
  if (reinterpret_cast<uintptr_t>(pointer) >= it->first + memory.bytes) return ze::kSuccess;
  if (memory.context != reinterpret_cast<Context*>(context)) return ze::kSuccess;
  out->type = memory.device < 0 ? ze::kMemoryShared : ze::kMemoryDevice;
  if (memory.device >= 0) *device = reinterpret_cast<ze::Device>(&fake.devices[static_cast<size_t>(memory.device)]);
  return ze::kSuccess;
}
EXPORT zeCommandListGetDeviceHandle(ze::CommandList list, ze::Device* out) {
  return *out = reinterpret_cast<ze::Device>(reinterpret_cast<List*>(list)->device), ze::kSuccess;
}
EXPORT zeCommandListGetContextHandle(ze::CommandList list, ze::Context* out) {
  return *out = reinterpret_cast<ze::Context>(reinterpret_cast<List*>(list)->context), ze::kSuccess;
}
