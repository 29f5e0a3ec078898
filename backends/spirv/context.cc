// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/context.h"

#include <algorithm>
#include <cstring>

#include "core/text.h"
#include "ops/rope/rope_fault_text.h"

namespace ropewalk {
namespace {

size_t HashOf(const RopeSpirvKey& key) {
  uint8_t bytes[sizeof(key)];
  std::memcpy(bytes, &key, sizeof(key));
  uint64_t hash = 0xcbf29ce484222325u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
  return static_cast<size_t>(hash ^ (hash >> 32));
}

bool NeedsFrequencies(const RopeCall& call) { return call.variant.table_dtype == kRopeNoDtype; }

std::string ContentOf(const ropewalk_frequencies& frequencies) {
  std::string content(reinterpret_cast<const char*>(frequencies.turns.data()),
                      frequencies.turns.size() * sizeof(uint64_t));
  return content.append(reinterpret_cast<const char*>(frequencies.axes.data()),
                        frequencies.axes.size() * sizeof(int32_t));
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

SpirvKernel* SpirvContext::FindKernel(const RopeSpirvKey& key) const {
  const Slots* slots = current_.load(std::memory_order_acquire);
  if (!slots) return nullptr;
  for (size_t i = HashOf(key) & slots->mask;; i = (i + 1) & slots->mask) {
    SpirvKernel* kernel = slots->kernels[i].load(std::memory_order_acquire);
    if (!kernel || kernel->key == key) return kernel;
  }
}

void SpirvContext::Insert(std::unique_ptr<SpirvKernel> kernel) {
  const auto put = [](Slots* slots, SpirvKernel* known) {
    size_t i = HashOf(known->key) & slots->mask;
    while (slots->kernels[i].load(std::memory_order_relaxed)) i = (i + 1) & slots->mask;
    slots->kernels[i].store(known, std::memory_order_release);
  };
  kernels_.push_back(std::move(kernel));
  if (slots_.empty() || kernels_.size() * 2 > slots_.back()->kernels.size()) {
    slots_.push_back(std::make_unique<Slots>(slots_.empty() ? 64 : slots_.back()->kernels.size() * 4));
    for (const auto& known : kernels_) put(slots_.back().get(), known.get());
    current_.store(slots_.back().get(), std::memory_order_release);
  } else {
    put(slots_.back().get(), kernels_.back().get());
  }
}

void SpirvContext::ForEachKernel(const std::function<void(const SpirvKernel&)>& visit) const {
  const std::lock_guard lock(mutex_);
  for (const auto& kernel : kernels_) visit(*kernel);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a launch needs

const void* SpirvContext::FindFrequencies(const ropewalk_frequencies& frequencies) {
  // A writer clears the id before it changes the address: the address read between two equal ids is theirs.
  const FrequenciesSlot& slot = frequencies_slots_[frequencies.id % frequencies_slots_.size()];
  if (slot.id.load(std::memory_order_acquire) != frequencies.id) return nullptr;
  const void* address = slot.address.load(std::memory_order_acquire);
  return slot.id.load(std::memory_order_relaxed) == frequencies.id ? address : nullptr;
}

bool SpirvContext::Find(const RopeCall& call, const RopeSpirvKey& key, Ready* ready) {
  ready->kernel = FindKernel(key);
  if (NeedsFrequencies(call)) ready->frequencies = FindFrequencies(*call.frequencies);
  if (rope_fault* faults = faults_.load(std::memory_order_acquire)) {
    ready->fault = faults + (call.params.batch > 1 ? 1 : 0) + (call.tensors.offsets ? 2 : 0);
  }
  return ready->kernel && ready->fault && (ready->frequencies || !NeedsFrequencies(call));
}

Status SpirvContext::Make(const RopeCall& call, const RopeSpirvKey& key, Ready* ready) {
  const std::lock_guard lock(mutex_);
  if (!FindKernel(key)) {
    auto kernel = std::make_unique<SpirvKernel>();
    kernel->key = key;
    kernel->name = RopeSpirvName(key);
    ROPEWALK_TRY(Build(key, kernel.get()));
    Insert(std::move(kernel));
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
  if (NeedsFrequencies(call) && !FindFrequencies(*call.frequencies)) {
    const std::string content = ContentOf(*call.frequencies);
    void*& address = frequencies_[content];
    if (!address) {
      void* fresh = nullptr;
      ROPEWALK_TRY(Allocate(content.size(), &fresh));
      ROPEWALK_TRY(CopyIn(fresh, content.data(), content.size()));
      address = fresh;
    }
    FrequenciesSlot& slot = frequencies_slots_[call.frequencies->id % frequencies_slots_.size()];
    slot.id.store(0, std::memory_order_release);
    slot.address.store(address, std::memory_order_release);
    slot.id.store(call.frequencies->id, std::memory_order_release);
  }
  if (!Find(call, key, ready)) {
    // Another thread's frequencies took the slot meanwhile: rare, and no reason to fail.
    ready->frequencies = frequencies_[ContentOf(*call.frequencies)];
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
