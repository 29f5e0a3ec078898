// The Intel GPU backend, "intel": on a caller's SYCL queue (backends/sycl), or through Level Zero on the caller's
// command list. With neither, on a list of our own, and the call returns when the work is done.
// SPDX-License-Identifier: Apache-2.0
#include "backends/contexts.h"
#include "backends/intel/level_zero/context.h"
#include "backends/intel/sycl/sycl.h"
#include "backends/registry.h"
#include "base/text.h"

namespace ropewalk {
namespace {

// The device of the call, if it can serve.
Status Usable(const LevelZeroDriver& driver, const RopeCall& call) {
  ROPEWALK_TRY(Opened(driver, "Level Zero", call));
  const int ordinal = call.device.device_id;
  const auto count = static_cast<int>(driver.devices.size());
  if (ordinal < 0 || ordinal >= count) {
    return Status::Invalid(
        Text("rope: q is on xpu:", ordinal, ", but Level Zero has ", count, count == 1 ? " GPU here" : " GPUs here"));
  }
  const LevelZeroDevice& device = driver.devices[static_cast<size_t>(ordinal)];
  if (!device.unfit.empty()) {
    return Status::Unavailable(Text("rope: q is on xpu:", ordinal, " (", device.name, "), which ", device.unfit,
                                    "; move the tensors to the CPU"));
  }
  return {};
}

Status Plan(const LevelZeroDriver& driver, const RopeCall& call, RopeSpirvPlan* plan) {
  ROPEWALK_TRY(Usable(driver, call));
  return PlanRopeSpirv(call, driver.devices[static_cast<size_t>(call.device.device_id)].properties, plan);
}

// `call`: the tensors of a RopeCall, or a RopeBackwardCall.
template <class Call>
Status CheckPointers(LevelZeroContext& context, const Call& call) {
  const LevelZeroDriver& driver = context.driver;
  const auto ask = [&](const char* name, const void* pointer, bool* keep) -> Status {
    ze::AllocationProperties properties{};
    ze::Device owner = nullptr;
    ROPEWALK_TRY(driver.Check(driver.MemGetAllocProperties(context.handle, pointer, &properties, &owner),
                              "zeMemGetAllocProperties", " for ", name));
    if (properties.type == ze::kMemoryUnknown) {
      return Status::Invalid(Text("rope: ", name, " is said to be on xpu:", context.ordinal,
                                  ", but its data is no memory of Level Zero's context; for memory of SYCL give "
                                  "sycl_queue"));
    }
    if (properties.type == ze::kMemoryDevice && owner != context.device().handle) {
      return Status::Invalid(
          Text("rope: ", name, " is said to be on xpu:", context.ordinal, ", but its data is on another device"));
    }
    *keep = properties.type == ze::kMemoryDevice;
    return {};
  };
  return context.pages.Check(call, 0, ask);
}

// ---------------------------------------------------------------------------------------------------------------------
// The backend

bool Serves(DLDevice device) { return DeviceType(device) == kDlOneApi; }

Availability Available() {
  std::string no_shims;
  const std::string shims = SyclText(&no_shims);
  const bool sycl = SyclIsLoaded();
  if (*RopeSpirvMissing())
    return {false, RopeSpirvMissing(), "build Ropewalk where clang and llvm-spirv are installed"};
  // What would help here, and then with SYCL queues.
  const auto remedy = [&](const std::string& here) {
    return Text(here, here.empty() || no_shims.empty() ? "" : "; ", no_shims);
  };
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  if (!driver.status.ok()) return {sycl, Text(driver.status.text(), "; ", shims), remedy(driver.remedy)};
  std::string detail = Text("Level Zero ", driver.version >> 16, ".", driver.version & 0xffff);
  bool usable = false;
  for (size_t i = 0; i < driver.devices.size(); ++i) {
    const LevelZeroDevice& device = driver.devices[i];
    Append(&detail, Text("; xpu:", i, " (", device.name, ")", device.unfit.empty() ? "" : " ", device.unfit));
    usable |= device.unfit.empty();
  }
  Append(&detail, Text("; ", shims));
  return {usable || sycl, detail, remedy(usable ? "" : "use a GPU that fits, or a newer driver")};
}

Status Launch(const RopeCall& call) {
  if (call.sycl_queue) return SyclLaunch(call);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(driver, call, &plan));
  if (plan.empty()) return {};
  LevelZeroContext* context = nullptr;
  const auto list = static_cast<ze::CommandList>(call.stream);
  ROPEWALK_TRY(EnterLevelZero(driver, call.device.device_id, list, &context));
  ROPEWALK_TRY(CheckPointers(*context, call.tensors));
  SpirvContext::Ready ready;
  ROPEWALK_TRY(context->FindOrMake(call, plan, &ready));
  RopeSpirvArgs args;
  FillRopeSpirvArgs(call, plan, ready.frequencies, ready.fault, &args);
  ROPEWALK_TRY(context->Launch(ready.kernel, plan, args, list));
  CountLaunch(context, ready.kernel);
  return {};
}

Status PlanBackward(const LevelZeroDriver& driver, const RopeBackwardCall& call, RopeSpirvBackwardPlan* plan) {
  ROPEWALK_TRY(Usable(driver, call.turn));
  return PlanRopeSpirvBackward(call, driver.devices[static_cast<size_t>(call.turn.device.device_id)].properties, plan);
}

Status BackwardWorkspace(const RopeBackwardCall& call, int64_t* elements) {
  if (call.turn.sycl_queue) return SyclBackwardWorkspace(call, elements);
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(GetLevelZeroDriver(), call, &plan));
  *elements = plan.workspace;
  return {};
}

Status LaunchBackward(const RopeBackwardCall& call) {
  if (call.turn.sycl_queue) return SyclLaunchBackward(call);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(driver, call, &plan));
  if (plan.rows.empty() && plan.sums.empty()) return {};
  LevelZeroContext* context = nullptr;
  const auto list = static_cast<ze::CommandList>(call.turn.stream);
  ROPEWALK_TRY(EnterLevelZero(driver, call.turn.device.device_id, list, &context));
  ROPEWALK_TRY(CheckPointers(*context, call));
  return LaunchSpirvBackward(
      *context, call, plan,
      [&](SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, bool is_last) -> Status {
        ROPEWALK_TRY(context->Launch(kernel, grid, args, list, is_last));
        CountLaunch(context, kernel);
        return {};
      });
}

// Without a stream: for every context that has been met on the device, and for our own.
Status Prepare(const RopeCall& call) {
  if (call.sycl_queue) return SyclPrepare(call);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(driver, call, &plan));
  if (plan.empty()) return {};
  LevelZeroContext* own = nullptr;
  ROPEWALK_TRY(EnterLevelZero(driver, call.device.device_id, nullptr, &own));
  Status status;
  ForEachLevelZeroContext([&](LevelZeroContext* context) {
    SpirvContext::Ready ready;
    if (context->ordinal == call.device.device_id && status.ok()) status = context->FindOrMake(call, plan, &ready);
  });
  return status;
}

Status Explain(const RopeCall& call, Explanation* explanation) {
  if (call.sycl_queue) return SyclExplain(call, explanation);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(driver, call, &plan));
  const SpirvKernel* kernel = nullptr;
  ForEachLevelZeroContext([&](LevelZeroContext* context) {
    if (context->ordinal == call.device.device_id && !kernel) kernel = context->FindKernel(plan.key);
  });
  const LevelZeroDevice& device = driver.devices[static_cast<size_t>(call.device.device_id)];
  explanation->emplace_back("device", Text("xpu:", call.device.device_id, " (", device.name, ")"));
  ExplainSpirv("intel", call, plan, kernel, explanation);
  return {};
}

void ForEachContext(const std::function<void(SpirvContext*)>& visit) {
  ForEachLevelZeroContext(visit);
  ForEachSyclContext(visit);
}

Status CheckFaults() {
  return FirstFault(ForEachContext, [](SpirvContext* context, std::string* text) { return context->TakeFaults(text); });
}

Status Force(const std::string& part) {
  if (part.empty()) return {};
  return Status::Invalid(Text("force_backend: intel has no parts, but \"", part, "\" is asked for"));
}

void Counters(std::vector<std::pair<std::string, int64_t>>* counters) {
  AddCounters("intel", ForEachContext, counters);
}

}  // namespace

const Backend kIntelBackend = {"intel",     Serves, Available, Launch,         Prepare,          Explain,
                               CheckFaults, Force,  Counters,  LaunchBackward, BackwardWorkspace};

}  // namespace ropewalk
