// What a backend that runs the SPIR-V kernel keeps for a device: kernels by variant, the turns of frequencies, the
// record of faults. How a kernel is built and memory is had is each backend's own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backends/kernel_table.h"
#include "backends/spirv/plan.h"
#include "base/status.h"

namespace ropewalk {

struct SpirvKernel {
  RopeSpirvKey key;
  std::string name;                    // RopeSpirvName
  std::string source = "from SPIR-V";  // for explain()
  void* module = nullptr;              // of the backend, as
  void* function = nullptr;            // this is: a cl_kernel, a ze_kernel_handle_t, ..
  int spilled_bytes = -1;              // -1: the driver does not say
  // Held from the first argument that is set to the launch, where a kernel's arguments are its state.
  std::mutex mutex;
  std::atomic<int64_t> launches{0};
};

class SpirvContext {
 public:
  virtual ~SpirvContext() = default;
  SpirvContext(const SpirvContext&) = delete;
  SpirvContext& operator=(const SpirvContext&) = delete;

  const std::string device_name;  // "xpu:0 (Intel(R) Data Center GPU Max 1550)"
  const SpirvDevice properties;
  std::atomic<bool> launched{false};  // since the last TakeFaults

  // What a launch needs and prepare() makes.
  struct Ready {
    SpirvKernel* kernel = nullptr;
    const void* frequencies = nullptr;  // on the device: turns, then axes; null with a table
    rope_fault* fault = nullptr;  // on the device: one of four, so that the message can say what the kernel cannot
  };
  // Lock-free, without allocation; false if something is still to be made.
  bool Find(const RopeCall& call, const RopeSpirvKey& key, Ready* ready);
  // Makes what is missing; may then allocate, build and wait. Copies stay as long as the context.
  Status FindOrMake(const RopeCall& call, const RopeSpirvPlan& plan, Ready* ready) {
    if (Find(call, plan.key, ready)) return {};
    return Make(call, plan.key, RopeSpirvPlanFault(call, properties, plan), ready);
  }
  // Likewise for both kernels of the gradient, as far as the plan has them.
  Status FindOrMake(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, Ready* rows, Ready* sums);
  SpirvKernel* FindKernel(const RopeSpirvKey& key) const { return kernels_.Find(key); }

  // Waits for the device where the backend can; "" or the first fault since the last call.
  Status TakeFaults(std::string* text);
  void ForEachKernel(const std::function<void(const SpirvKernel&)>& visit) const;

 protected:
  SpirvContext(std::string name, SpirvDevice device) : device_name(std::move(name)), properties(device) {}

  // Never two at a time.
  virtual Status Build(const RopeSpirvKey& key, SpirvKernel* kernel) = 0;
  virtual Status Allocate(size_t bytes, void** out) = 0;  // aligned to 64 bytes at least; never freed
  virtual Status CopyIn(void* to, const void* from, size_t bytes) = 0;
  virtual Status CopyOut(void* to, const void* from, size_t bytes) = 0;
  virtual Status Wait() = 0;  // for what was launched

 private:
  // `fault`: of the plan that has the key.
  Status Make(const RopeCall& call, const RopeSpirvKey& key, const std::string& fault, Ready* ready);
  Status ResetFaults();

  mutable std::mutex mutex_;
  KernelTable<SpirvKernel> kernels_;
  FrequencyCopies<void*> frequencies_;
  std::atomic<rope_fault*> faults_{nullptr};
};

// Launches the gradient by `launch(kernel, grid, args, is_last)`, once for each of its kernels; the second must see
// what the first has written.
template <class Context, class Launch>
Status LaunchSpirvBackward(Context& context, const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan,
                           const Launch& launch) {
  SpirvContext::Ready rows, sums;
  ROPEWALK_TRY(context.FindOrMake(call, plan, &rows, &sums));
  RopeSpirvArgs args;
  if (!plan.rows.empty()) {
    FillRopeSpirvBackwardArgs(call, plan, rows.frequencies, rows.fault, &args);
    ROPEWALK_TRY(launch(rows.kernel, plan.rows, args, plan.sums.empty()));
  }
  if (plan.sums.empty()) return {};
  FillRopeSpirvSumsArgs(call, plan, &args);
  return launch(sums.kernel, plan.sums, args, true);
}

// Adds what explain() says of the kernel that a plan wants; null: it is not built yet.
void ExplainSpirv(const char* backend, const RopeCall& call, const RopeSpirvPlan& plan, const SpirvKernel* kernel,
                  std::vector<std::pair<std::string, std::string>>* explanation);

}  // namespace ropewalk
