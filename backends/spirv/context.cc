// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/context.h"

#include "base/text.h"
#include "rope/fault_text.h"

namespace ropewalk {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

void SpirvContext::ForEachKernel(const std::function<void(const SpirvKernel&)>& visit) const {
  const std::lock_guard lock(mutex_);
  for (const auto& kernel : kernels_.all()) visit(*kernel);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a launch needs

bool SpirvContext::Find(const RopeCall& call, const RopeSpirvKey& key, Ready* ready) {
  ready->kernel = FindKernel(key);
  if (NeedsFrequencies(call)) ready->frequencies = frequencies_.Find(*call.frequencies);
  if (rope_fault* faults = faults_.load(std::memory_order_acquire)) {
    ready->fault = faults + (call.params.batch > 1 ? 1 : 0) + (call.tensors.offsets ? 2 : 0);
  }
  return ready->kernel && ready->fault && (ready->frequencies || !NeedsFrequencies(call));
}

Status SpirvContext::FindOrMake(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, Ready* rows,
                                Ready* sums) {
  const auto make = [&](const SpirvGrid& grid, const RopeSpirvKey& key, Ready* ready) -> Status {
    if (grid.empty() || Find(call.turn, key, ready)) return {};
    return Make(call.turn, key, RopeSpirvBackwardPlanFault(call, properties, plan), ready);
  };
  ROPEWALK_TRY(make(plan.rows, plan.rows.key, rows));
  return make(plan.sums, plan.sums_key, sums);
}

Status SpirvContext::Make(const RopeCall& call, const RopeSpirvKey& key, const std::string& fault, Ready* ready) {
  if (!fault.empty()) {
    return Status::Internal(Text("rope: the plan of a kernel for ", device_name, " is wrong: ", fault));
  }
  const std::lock_guard lock(mutex_);
  if (!FindKernel(key)) {
    auto kernel = std::make_unique<SpirvKernel>();
    kernel->key = key;
    kernel->name = RopeSpirvName(key);
    ROPEWALK_TRY(Build(key, kernel.get()));
    kernels_.Insert(std::move(kernel));
  }
  if (!faults_.load(std::memory_order_relaxed)) {
    void* faults = nullptr;
    ROPEWALK_TRY(Allocate(sizeof(rope_fault) * kRopeFaultRecords, &faults));
    faults_.store(static_cast<rope_fault*>(faults), std::memory_order_release);
    if (Status status = ResetFaults(); !status.ok()) {
      faults_.store(nullptr, std::memory_order_release);
      return status;
    }
  }
  void* frequencies = nullptr;
  if (NeedsFrequencies(call) && !(frequencies = frequencies_.FindEqual(*call.frequencies))) {
    const std::string bytes = DeviceCopyOf(*call.frequencies);
    ROPEWALK_TRY(Allocate(bytes.size(), &frequencies));
    ROPEWALK_TRY(CopyIn(frequencies, bytes.data(), bytes.size()));
    frequencies_.Keep(*call.frequencies, frequencies);
  }
  if (!Find(call, key, ready)) {
    // Another thread's frequencies took the slot meanwhile: rare, and no reason to fail.
    ready->frequencies = frequencies;
    if (!ready->kernel || !ready->frequencies) return Status::Internal("rope: a kernel was built, but is not found");
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults

Status SpirvContext::ResetFaults() {
  const auto none = NoRopeFaults();
  return CopyIn(faults_.load(std::memory_order_relaxed), none.data(), sizeof(none));
}

Status SpirvContext::TakeFaults(std::string* text) {
  const std::lock_guard lock(mutex_);
  rope_fault* faults = faults_.load(std::memory_order_relaxed);
  if (!faults || !launched.exchange(false)) return {};
  std::array<rope_fault, kRopeFaultRecords> found;
  Status status = Wait();
  if (status.ok()) status = CopyOut(found.data(), faults, sizeof(found));
  if (!status.ok()) {
    launched.store(true);  // the next call asks again
    return status;
  }
  *text = RopeFaultText(found);
  return text->empty() ? Status() : ResetFaults();
}

void ExplainSpirv(const char* backend, const RopeCall& call, const RopeSpirvPlan& plan, const SpirvKernel* kernel,
                  std::vector<std::pair<std::string, std::string>>* explanation) {
  const auto add = [&](const char* key, std::string value) { explanation->emplace_back(key, std::move(value)); };
  if (plan.empty()) {
    add("kernel", "none");
    add("why", "there is no work");
    return;
  }
  add("kernel", Text(backend, " ", RopeSpirvName(plan.key)));
  add("source", kernel ? Text("memory, ", kernel->source) : "would be built now from SPIR-V");
  if (kernel && kernel->spilled_bytes >= 0) add("spilled bytes", Text(kernel->spilled_bytes));
  add("angles", NeedsFrequencies(call) ? "frequencies" : "table");
  add("groups", Text(plan.groups[0], " x ", plan.groups[1], " x ", plan.groups[2]));
  add("work-items", Text(plan.local));
  add("why", plan.why);
}

}  // namespace ropewalk
