// SPDX-License-Identifier: Apache-2.0
#include "backends/intel/level_zero/context.h"

#include "backends/contexts.h"
#include "base/fork.h"
#include "base/text.h"
#include "base/wide_stack.h"

namespace ropewalk {
namespace {

constinit ContextLists<LevelZeroContext> contexts_met;
const OnFork kForgetContexts([] { contexts_met.Forget(); });

LevelZeroContext* FindOther(const ContextLists<LevelZeroContext>::OfDevice& contexts, ze::Context handle) {
  return contexts.FindOther([&](const LevelZeroContext& context) { return context.handle == handle; });
}

// What the compiler of the driver says, shortened; "" if nothing.
std::string TakeLog(const LevelZeroDriver& driver, ze::BuildLog log) {
  if (!log) return "";
  size_t bytes = 0;
  std::string text;
  if (driver.BuildLogGetString(log, &bytes, nullptr) == ze::kSuccess && bytes > 1) {
    text.resize(bytes);
    if (driver.BuildLogGetString(log, &bytes, text.data()) != ze::kSuccess) text.clear();
    while (!text.empty() && (text.back() == '\0' || text.back() == '\n')) text.pop_back();
    constexpr size_t kMost = 2000;
    if (text.size() > kMost) text = text.substr(0, kMost) + " ..";
  }
  driver.BuildLogDestroy(log);
  return text;
}

}  // namespace

Status BuildLevelZeroKernel(const LevelZeroDriver& driver, ze::Context context, ze::Device device,
                            const RopeSpirvKey& key, SpirvKernel* kernel) {
  const SpirvModule* module = RopeSpirvModuleOf(key);
  if (!module) {
    return Status::Unavailable(
        Text("rope: there is no SPIR-V for ", RopeSpirvName(key), " in this build: ", RopeSpirvMissing()));
  }
  const auto constants = RopeSpirvConstants(key);
  uint32_t ids[kRopeSpecCount];
  const void* values[kRopeSpecCount];
  for (size_t i = 0; i < constants.size(); ++i) {
    ids[i] = constants[i].id;
    values[i] = &constants[i].value;
  }
  const ze::ModuleConstants specialisation = {static_cast<uint32_t>(constants.size()), ids, values};
  ze::ModuleDesc module_desc;
  module_desc.size = module->size;
  module_desc.bytes = module->bytes;
  module_desc.options = kRopeLevelZeroOptions;
  module_desc.constants = &specialisation;
  ze::Module built = nullptr;
  ze::BuildLog log = nullptr;
  ze::Result result = ze::kSuccess;
  OnWideStack([&] { result = driver.ModuleCreate(context, device, &module_desc, &built, &log); });
  const std::string said = TakeLog(driver, log);
  ROPEWALK_TRY(driver.Check(result, "zeModuleCreate", " for ", kernel->name, said.empty() ? "" : ":\n", said));

  ze::KernelDesc kernel_desc;
  kernel_desc.name = RopeSpirvFunction(key);
  ze::Kernel function = nullptr;
  Status status =
      driver.Check(driver.KernelCreate(built, &kernel_desc, &function), "zeKernelCreate", " for ", kernel->name);
  ze::KernelProperties properties{};
  if (status.ok()) status = driver.Check(driver.KernelGetProperties(function, &properties), "zeKernelGetProperties");
  if (!status.ok()) {
    driver.ModuleDestroy(built);
    return status;
  }
  kernel->module = built;
  kernel->function = function;
  kernel->spilled_bytes = static_cast<int>(properties.spilled_bytes);
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// A context

LevelZeroContext::LevelZeroContext(const LevelZeroDriver& driver_, int ordinal_, ze::Context handle_)
    : SpirvContext(Text("xpu:", ordinal_, " (", driver_.devices[static_cast<size_t>(ordinal_)].name, ")"),
                   driver_.devices[static_cast<size_t>(ordinal_)].properties),
      driver(driver_),
      ordinal(ordinal_),
      handle(handle_) {}

Status LevelZeroContext::Build(const RopeSpirvKey& key, SpirvKernel* kernel) {
  return BuildLevelZeroKernel(driver, handle, device().handle, key, kernel);
}

Status LevelZeroContext::Allocate(size_t bytes, void** out) {
  const ze::DeviceMemoryDesc desc;
  return driver.Check(driver.MemAllocDevice(handle, &desc, bytes, 64, device().handle, out), "zeMemAllocDevice",
                      " for ", bytes, " bytes");
}

Status LevelZeroContext::OwnList(ze::CommandList* list) {
  if (!list_) {
    ze::QueueDesc desc;
    desc.ordinal = device().compute_group;
    desc.mode = ze::kQueueSynchronous;
    ROPEWALK_TRY(driver.Check(driver.CommandListCreateImmediate(handle, device().handle, &desc, &list_),
                              "zeCommandListCreateImmediate", " on ", device_name));
  }
  *list = list_;
  return {};
}

Status LevelZeroContext::Copy(void* to, const void* from, size_t bytes) {
  const std::lock_guard lock(list_mutex_);
  ze::CommandList list = nullptr;
  ROPEWALK_TRY(OwnList(&list));
  return driver.Check(driver.AppendMemoryCopy(list, to, from, bytes, nullptr, 0, nullptr),
                      "zeCommandListAppendMemoryCopy", " on ", device_name);
}

Status LevelZeroContext::Launch(SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args,
                                ze::CommandList list, bool is_last) {
  const ze::Groups groups = {grid.groups[0], grid.groups[1], grid.groups[2]};
  const auto function = static_cast<ze::Kernel>(kernel->function);
  std::unique_lock<std::mutex> own;
  if (!list) {
    own = std::unique_lock(list_mutex_);
    ROPEWALK_TRY(OwnList(&list));
  }
  const std::lock_guard lock(kernel->mutex);
  ze::Result result = driver.KernelSetGroupSize(function, grid.local, 1, 1);
  for (uint32_t i = 0; i < args.count && result == ze::kSuccess; ++i) {
    const void* const& pointer = args.pointers[i];
    // A null tensor is said by a null value: drivers refuse the address 0.
    result = driver.KernelSetArgumentValue(function, i, sizeof(pointer), pointer ? &pointer : nullptr);
  }
  if (result == ze::kSuccess) result = driver.KernelSetArgumentValue(function, args.count, args.bytes, args.data());
  if (result == ze::kSuccess) result = driver.AppendLaunchKernel(list, function, &groups, nullptr, 0, nullptr);
  ROPEWALK_TRY(driver.Check(result, "zeCommandListAppendLaunchKernel", " on ", device_name));
  if (is_last) return {};
  return driver.Check(driver.AppendBarrier(list, nullptr, 0, nullptr), "zeCommandListAppendBarrier", " on ",
                      device_name);
}

// ---------------------------------------------------------------------------------------------------------------------
// Which context

Status EnterLevelZero(const LevelZeroDriver& driver, int ordinal, ze::CommandList list, LevelZeroContext** out) {
  auto& contexts = contexts_met.All(driver.devices.size())[static_cast<size_t>(ordinal)];
  const LevelZeroDevice& device = driver.devices[static_cast<size_t>(ordinal)];
  ze::Context handle = nullptr;
  if (list && driver.CommandListGetDevice && driver.CommandListGetContext) {
    ze::Device owner = nullptr;
    ROPEWALK_TRY(driver.Check(driver.CommandListGetDevice(list, &owner), "zeCommandListGetDeviceHandle"));
    if (owner != device.handle) {
      for (size_t i = 0; i < driver.devices.size(); ++i) {
        if (driver.devices[i].handle == owner) {
          return Status::Invalid(Text("rope: q is on xpu:", ordinal, ", but the stream is a command list of xpu:", i));
        }
      }
      return Status::Invalid(
          Text("rope: q is on xpu:", ordinal, ", but the stream is a command list of another device"));
    }
    ROPEWALK_TRY(driver.Check(driver.CommandListGetContext(list, &handle), "zeCommandListGetContextHandle"));
  }
  LevelZeroContext* own = contexts.own.load(std::memory_order_acquire);
  if (!handle || (own && own->handle == handle)) {
    if (!own) {
      const std::lock_guard lock(contexts_met.mutex);
      own = contexts.own.load(std::memory_order_relaxed);
      if (!own) {
        const ze::ContextDesc desc;
        ROPEWALK_TRY(driver.Check(driver.ContextCreate(device.driver, &desc, &handle), "zeContextCreate"));
        own = new LevelZeroContext(driver, ordinal, handle);
        contexts.own.store(own, std::memory_order_release);
      }
    }
    *out = own;
    return {};
  }
  if ((*out = FindOther(contexts, handle))) return {};
  const std::lock_guard lock(contexts_met.mutex);
  if ((*out = FindOther(contexts, handle))) return {};
  *out = new LevelZeroContext(driver, ordinal, handle);
  contexts.AddOther(*out);
  return {};
}

void ForEachLevelZeroContext(const std::function<void(LevelZeroContext*)>& visit) {
  if (!LevelZeroDriverWasLoaded()) return;
  contexts_met.ForEach(GetLevelZeroDriver().devices.size(), visit);
}

}  // namespace ropewalk
