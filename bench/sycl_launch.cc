// What a call on a SYCL queue costs on the host, beside the run-time's own launch of the same kernel with the same
// arguments: Intel's CPU device, one token, nanoseconds of a call, the wait left out; the median of many batches.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>

#include "backends/intel/sycl/shim.h"
#include "backends/intel/sycl/sycl.h"
#include "conformance/case_call.h"
#include "measure/measure.h"
#include "tests/intel/sycl_memory.h"

namespace ropewalk {
namespace {

int Main() {
  if (!Device()) return std::fprintf(stderr, "error: %s\n", missing.c_str()), 2;
  SyclTestMemory memory;
  RopeCase c;
  c.name = "launch";
  c.tokens = 1;
  std::unique_ptr<CaseCall> call;
  if (const Status status = CaseCall::Make(c, memory, &call); !status.ok()) {
    return std::fprintf(stderr, "error: %s\n", status.text().c_str()), 2;
  }
  if (ropewalk_rope(&call->args(), nullptr) != ROPEWALK_OK) {
    return std::fprintf(stderr, "error: %s\n", ropewalk_last_error()), 2;
  }
  // The same launch without us: the kernel that has just run, its arguments made before.
  const SpirvKernel* kernel = nullptr;
  SpirvContext* context = nullptr;
  ForEachSyclContext([&](SpirvContext* found) {
    context = found;
    found->ForEachKernel([&](const SpirvKernel& one) { kernel = &one; });
  });
  void* library = dlopen(ROPEWALK_SYCL_SHIM, RTLD_NOW);
  const SyclShim* shim = reinterpret_cast<SyclShimFunction*>(dlsym(library, "ropewalk_sycl_shim"))();
  RopeCall lowered;
  RopeSpirvPlan plan;
  SpirvContext::Ready ready;
  RopeSpirvArgs args;
  void* entry = nullptr;
  const SyclQueueInfo* info = nullptr;
  char error[kSyclErrorBytes];
  if (!LowerRope(call->args(), nullptr, &lowered).ok() || !PlanRopeSpirv(lowered, context->properties, &plan).ok() ||
      !context->Find(lowered, plan.key, &ready) || shim->find(memory.sycl_queue(), &entry, &info, error)) {
    return std::fprintf(stderr, "error: the launch cannot be made again\n"), 2;
  }
  FillRopeSpirvArgs(lowered, plan, ready.frequencies, ready.fault, &args);
  SyclArgument arguments[kRopeSpirvArguments];
  for (size_t i = 0; i < args.pointers.size(); ++i) arguments[i] = {&args.pointers[i], sizeof(void*), 1};
  arguments[kRopeSpirvPointers] = {&args.params, sizeof(args.params), 0};
  const bench::LaunchCost cost = bench::MeasureLaunch(
      [&] {
        shim->launch(entry, ready.kernel->function, arguments, kRopeSpirvArguments, plan.groups, plan.local, error);
      },
      [&] { (void)ropewalk_rope(&call->args(), nullptr); }, [&] { return memory.Synchronize(); });
  std::printf("%s: %.0f ns a call, %.0f ns of it SYCL's own launch: %.0f ns ours (%s)\n", context->device_name.c_str(),
              cost.ours, cost.own, cost.ours - cost.own, kernel->name.c_str());
  return cost.held() ? 0 : 1;
}

}  // namespace
}  // namespace ropewalk

int main() { return ropewalk::Main(); }
