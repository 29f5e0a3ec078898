// What a call on an OpenCL queue costs on the host, beside the run-time's own launch of the same kernel with the same
// arguments, set before: one token, nanoseconds of a call, the wait left out; the median of many batches.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>

#include "backends/opencl/build.h"
#include "backends/opencl/context.h"
#include "conformance/case_call.h"
#include "measure/measure.h"

namespace ropewalk {
namespace {

Status Measure() {
  const OpenClLibrary& library = GetOpenCl();
  ROPEWALK_TRY(library.status);
  DeviceMemory& memory = OpenClMemory();
  RopeCase c;
  c.name = "launch";
  c.tokens = 1;
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::Make(c, memory, &call));
  ROPEWALK_TRY(call->Run());

  auto* queue = static_cast<cl::Queue>(memory.stream());
  OpenClContext* context = nullptr;
  ROPEWALK_TRY(FindOpenClContext(library, 0, queue, &context));
  RopeCall lowered;
  RopeSpirvPlan plan;
  SpirvContext::Ready ready;
  ROPEWALK_TRY(LowerRope(call->args(), queue, &lowered));
  ROPEWALK_TRY(PlanRopeSpirv(lowered, context->properties, &plan));
  if (!context->Find(lowered, plan.key, &ready)) return Status::Internal("the kernel that ran is not found");
  RopeSpirvArgs args;
  FillRopeSpirvArgs(lowered, plan, ready.frequencies, ready.fault, &args);
  cl::Kernel kernel = nullptr;
  double milliseconds = 0;
  ROPEWALK_TRY(BuildOpenClKernel(library, context->handle, context->device, plan.key, &kernel, &milliseconds));
  for (cl::Uint i = 0; i < kRopeSpirvPointers; ++i) {
    ROPEWALK_TRY(
        library.Check(library.SetKernelArgSvmPointer(kernel, i, args.pointers[i]), "clSetKernelArgSVMPointer"));
  }
  ROPEWALK_TRY(library.Check(library.SetKernelArg(kernel, kRopeSpirvPointers, sizeof(args.params), &args.params),
                             "clSetKernelArg"));
  const size_t global[3] = {size_t{plan.groups[0]} * plan.local, plan.groups[1], plan.groups[2]};
  const size_t local[3] = {plan.local, 1, 1};

  const bench::LaunchCost cost = bench::MeasureLaunch(
      [&] { library.EnqueueNdRange(queue, kernel, 3, nullptr, global, local, 0, nullptr, nullptr); },
      [&] { (void)ropewalk_rope(&call->args(), queue); }, [&] { return memory.Synchronize(); });
  std::printf("%s: %.0f ns a call, %.0f ns of it the run-time's own launch: %.0f ns ours (%s, built in %.0f ms)\n",
              context->device_name.c_str(), cost.ours, cost.own, cost.ours - cost.own, ready.kernel->name.c_str(),
              milliseconds);
  return cost.held() ? Status() : Status::Internal("more than 2,000 ns ours");
}

}  // namespace
}  // namespace ropewalk

int main() {
  const ropewalk::Status status = ropewalk::Measure();
  if (!status.ok()) std::fprintf(stderr, "error: %s\n", status.text().c_str());
  return status.ok() ? 0 : 1;
}
