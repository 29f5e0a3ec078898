// The OpenCL backend: the SPIR-V kernel on any OpenCL device that takes it, or the kernel's text on one that does not.
// Serves kDLOpenCL tensors, whose data are pointers to shared virtual memory (SVM) or unified shared memory (USM), and,
// forced, tensors on the CPU where the device works on all memory of the process.
// SPDX-License-Identifier: Apache-2.0
#include "backends/contexts.h"
#include "backends/opencl/context.h"
#include "backends/opencl/library.h"
#include "backends/registry.h"
#include "base/text.h"

namespace ropewalk {
namespace {

bool OnHost(const RopeCall& call) { return DeviceType(call.device) == kDLCPU; }

// The device's place among library.devices, if it can serve the call.
Status Usable(const OpenClLibrary& library, const RopeCall& call, size_t* place) {
  ROPEWALK_TRY(Opened(library, "OpenCL", call));
  *place = OnHost(call) ? 0 : static_cast<size_t>(call.device.device_id);
  if (call.device.device_id < 0 || *place >= library.devices.size()) {
    return Status::Invalid(Text("rope: q is on opencl:", call.device.device_id, ", but there are ",
                                library.devices.size(), " OpenCL devices"));
  }
  const OpenClDevice& device = library.devices[*place];
  if (!device.refusal.empty()) {
    return Status::Unavailable(Text("rope: q is on opencl:", *place, ", but ", device.text, " ", device.refusal));
  }
  if (OnHost(call) && !device.system_memory) {
    return Status::Unavailable(Text("rope: q is on the CPU, but ", device.text,
                                    " does not work on the memory of the process; give tensors of SVM or USM as "
                                    "kDLOpenCL, or choose another device (ROPEWALK_OPENCL_DEVICE)"));
  }
  return {};
}

Status Plan(const OpenClLibrary& library, const RopeCall& call, size_t* place, RopeSpirvPlan* plan) {
  ROPEWALK_TRY(Usable(library, call, place));
  return PlanRopeSpirv(call, library.devices[*place].properties, plan);
}

bool Serves(DLDevice device) { return DeviceType(device) == kDLOpenCL || DeviceType(device) == kDLCPU; }

Availability Available() {
  const OpenClLibrary& library = GetOpenCl();
  if (!library.status.ok()) return {false, library.status.text(), library.remedy};
  std::string detail = library.path;
  for (size_t i = 0; i < library.devices.size(); ++i) {
    const OpenClDevice& device = library.devices[i];
    Append(&detail, Text("; opencl:", i, " ", device.text, device.refusal.empty() ? "" : " ", device.refusal));
  }
  if (*RopeSpirvMissing()) Append(&detail, Text("; without SPIR-V: ", RopeSpirvMissing()));
  return {true, detail, ""};
}

Status Launch(const RopeCall& call) {
  const OpenClLibrary& library = GetOpenCl();
  size_t place = 0;
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(library, call, &place, &plan));
  if (plan.empty()) return {};
  auto queue = OnHost(call) ? nullptr : static_cast<cl::Queue>(call.stream);
  const bool wait = !queue;
  OpenClContext* context = nullptr;
  ROPEWALK_TRY(FindOpenClContext(library, place, queue, &context));
  SpirvContext::Ready ready;
  ROPEWALK_TRY(context->FindOrMake(call, plan, &ready));
  if (!queue) ROPEWALK_TRY(context->OwnQueue(&queue));
  RopeSpirvArgs args;
  FillRopeSpirvArgs(call, plan, ready.frequencies, ready.fault, &args);
  ROPEWALK_TRY(context->Launch(ready.kernel, plan, args, queue));
  // Nobody else can wait for a queue of ours.
  return wait ? library.Check(library.Finish(queue), "clFinish", " on ", context->device_name) : Status();
}

Status PlanBackward(const OpenClLibrary& library, const RopeBackwardCall& call, size_t* place,
                    RopeSpirvBackwardPlan* plan) {
  ROPEWALK_TRY(Usable(library, call.turn, place));
  return PlanRopeSpirvBackward(call, library.devices[*place].properties, plan);
}

Status BackwardWorkspace(const RopeBackwardCall& call, int64_t* elements) {
  size_t place = 0;
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(GetOpenCl(), call, &place, &plan));
  *elements = plan.workspace;
  return {};
}

Status LaunchBackward(const RopeBackwardCall& call) {
  const OpenClLibrary& library = GetOpenCl();
  size_t place = 0;
  RopeSpirvBackwardPlan plan;
  ROPEWALK_TRY(PlanBackward(library, call, &place, &plan));
  if (plan.rows.empty() && plan.sums.empty()) return {};
  auto queue = OnHost(call.turn) ? nullptr : static_cast<cl::Queue>(call.turn.stream);
  const bool wait = !queue;
  OpenClContext* context = nullptr;
  ROPEWALK_TRY(FindOpenClContext(library, place, queue, &context));
  if (!queue) ROPEWALK_TRY(context->OwnQueue(&queue));
  // A caller's queue need not be in order: the second kernel waits for the first.
  cl::Event first = nullptr;
  const auto launch = [&](SpirvKernel* kernel, const SpirvGrid& grid, const RopeSpirvArgs& args, bool is_last) {
    return context->Launch(kernel, grid, args, queue, first, is_last ? nullptr : &first);
  };
  const Status launched = LaunchSpirvBackward(*context, call, plan, launch);
  if (first) library.ReleaseEvent(first);
  ROPEWALK_TRY(launched);
  return wait ? library.Check(library.Finish(queue), "clFinish", " on ", context->device_name) : Status();
}

Status Prepare(const RopeCall& call) {
  const OpenClLibrary& library = GetOpenCl();
  size_t place = 0;
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(library, call, &place, &plan));
  if (plan.empty()) return {};
  // In the contexts that queues have brought; in ours if there are none, or if that is where the call will run.
  Status status;
  bool prepared = false;
  const auto make = [&](OpenClContext* context) {
    SpirvContext::Ready ready;
    if (status.ok()) status = context->FindOrMake(call, plan, &ready);
    prepared = true;
  };
  ForEachOpenClContext([&](OpenClContext* context) {
    if (context->device.handle == library.devices[place].handle) make(context);
  });
  if (!prepared) {
    OpenClContext* context = nullptr;
    ROPEWALK_TRY(FindOpenClContext(library, place, nullptr, &context));
    make(context);
  }
  return status;
}

Status Explain(const RopeCall& call, Explanation* explanation) {
  const OpenClLibrary& library = GetOpenCl();
  size_t place = 0;
  RopeSpirvPlan plan;
  ROPEWALK_TRY(Plan(library, call, &place, &plan));
  explanation->emplace_back("device", Text("opencl:", place, " ", library.devices[place].text));
  const SpirvKernel* kernel = nullptr;
  ForEachOpenClContext([&](OpenClContext* context) {
    if (context->device.handle == library.devices[place].handle && !kernel) kernel = context->FindKernel(plan.key);
  });
  ExplainSpirv("opencl", call, plan, kernel, explanation);
  return {};
}

Status CheckFaults() {
  if (!OpenClWasLoaded()) return {};
  return FirstFault(ForEachOpenClContext,
                    [](SpirvContext* context, std::string* text) { return context->TakeFaults(text); });
}

Status Force(const std::string& part) {
  if (part.empty()) return {};
  return Status::Invalid(Text("force_backend: opencl has no parts, but \"", part,
                              "\" is asked for; ROPEWALK_OPENCL_DEVICE chooses a device"));
}

void Counters(std::vector<std::pair<std::string, int64_t>>* counters) {
  AddCounters("opencl", ForEachOpenClContext, counters);
}

}  // namespace

const Backend kOpenClBackend = {"opencl",    Serves, Available, Launch,         Prepare,          Explain,
                                CheckFaults, Force,  Counters,  LaunchBackward, BackwardWorkspace};

}  // namespace ropewalk
