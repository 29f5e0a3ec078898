// What a warm call on CUDA costs on the host, beside the driver's own launch of the same kernel with the same argument:
// nanoseconds of a call, the wait left out; the median of many batches.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "backends/cuda/context.h"
#include "backends/cuda/plan.h"
#include "conformance/case_call.h"
#include "measure/measure.h"

namespace ropewalk {
namespace {

constexpr double kAim = 200;  // nanoseconds over the driver's launch

Status Measure(RopeCase c, const char* what, bool* held) {
  DeviceMemory& memory = CudaMemory();
  const CudaDriver& driver = GetCudaDriver();
  ROPEWALK_TRY(driver.status);
  c.name = CaseName(c);
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::Make(c, memory, &call));
  ROPEWALK_TRY(call->Run());

  RopeCall lowered;
  RopeCudaPlan plan;
  ROPEWALK_TRY(LowerRope(call->args(), nullptr, &lowered));
  ROPEWALK_TRY(PlanRopeCuda(lowered, driver.devices[0].properties, {.dependent_launch = true}, &plan));
  const CudaKernel* kernel = nullptr;
  CudaContext* context = nullptr;
  ForEachCudaContext([&](CudaContext* met) {
    context = met;
    kernel = met->FindKernel(plan.key);
  });
  if (!kernel) return Status::Internal("the kernel that ran is not found");
  CudaContextScope scope;
  ROPEWALK_TRY(scope.Enter(context));

  // What the kernel is given does not matter to the launch, as long as it is valid.
  const RopeTensors& t = lowered.tensors;
  rope_cuda_args args;
  std::memset(&args, 0, sizeof(args));
  args.q = args.q_out = t.q;
  args.k = args.k_out = t.k;
  args.positions = t.positions;
  args.turns = reinterpret_cast<const rw_u64*>(context->FindFrequencies(*lowered.frequencies));
  args.q_weight = t.q_weight;
  args.k_weight = t.k_weight;
  args.slots = t.slots;
  args.slot_count = lowered.params.slots;
  args.k_cache = t.k_cache;
  args.v_cache = t.v_cache;
  args.v = t.v;
  args.k_inverse_scale = args.v_inverse_scale = 1.0f;
  args.params = lowered.params;
  cu::LaunchAttribute attribute;
  attribute.id = cu::kProgrammaticStreamSerialization;
  attribute.value.number = 1;
  const cu::LaunchConfig config = {
      plan.grid_x, plan.grid_y, 1, plan.key.threads, 1, 1, 0, nullptr, &attribute, plan.key.dependent_launch ? 1u : 0u};
  void* parameters[] = {&args};
  const bench::LaunchCost cost =
      bench::MeasureLaunch([&] { driver.LaunchKernelEx(&config, kernel->function, parameters, nullptr); },
                           [&] { (void)ropewalk_rope(&call->args(), nullptr); }, [&] { return memory.Synchronize(); });
  std::printf("%-20s %5.0f ns a call, %5.0f of it the driver's own launch: %4.0f ns ours, aim %.0f%s\n", what,
              cost.ours, cost.own, cost.ours - cost.own, kAim, cost.ours - cost.own <= kAim ? "" : " (missed)");
  *held &= cost.ours - cost.own <= kAim;
  return {};
}

Status MeasureAll(bool* held) {
  const RopeCase plain = {.tokens = 1, .q_heads = 32, .k_heads = 8};
  RopeCase norm = plain;
  norm.norm = true;
  norm.weight = Weight::kPlain;
  norm.weight_dtype = kBF16;
  RopeCase store = norm;
  store.cache = Cache::kNhd;
  store.cache_dtype = kBF16;
  store.v_dim = 128;
  ROPEWALK_TRY(Measure(plain, "rope", held));
  ROPEWALK_TRY(Measure(norm, "norm + rope", held));
  return Measure(store, "norm + rope + store", held);
}

}  // namespace
}  // namespace ropewalk

int main() {
  bool held = true;
  const ropewalk::Status status = ropewalk::MeasureAll(&held);
  if (!status.ok()) std::fprintf(stderr, "error: %s\n", status.text().c_str());
  if (status.ok()) std::printf("%s\n", ropewalk::GetCudaDriver().devices[0].name.c_str());
  return status.ok() && held ? 0 : 1;
}
