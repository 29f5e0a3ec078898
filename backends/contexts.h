// What the backends of GPUs do alike: a driver that is not there, launches counted, faults gathered from contexts.
// `for_each(visit)` calls visit(context) for each context that has been met.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "rope/arguments.h"
#include "rope/call.h"

namespace ropewalk {

// OK if the driver could be opened: else why not, and what would help.
template <class Driver>
Status Opened(const Driver& driver, const char* what, const RopeCall& call) {
  if (driver.status.ok()) return {};
  return Status(driver.status.code(),
                Text("rope: q is on ", DeviceName(call.device), ", but ", what,
                     " is not available: ", driver.status.text(), driver.remedy.empty() ? "" : "; ", driver.remedy));
}

// After each launch. The flag is read first, so that threads that launch share its cache line.
template <class Context, class Kernel>
void CountLaunch(Context* context, Kernel* kernel) {
  kernel->launches.fetch_add(1, std::memory_order_relaxed);
  if (!context->launched.load(std::memory_order_relaxed)) context->launched.store(true, std::memory_order_relaxed);
}

template <class ForEach>
void AddCounters(const char* backend, const ForEach& for_each, std::vector<std::pair<std::string, int64_t>>* counters) {
  std::map<std::string, int64_t> counts;
  for_each([&](auto* context) {
    context->ForEachKernel([&](const auto& kernel) {
      if (const int64_t count = kernel.launches.load(std::memory_order_relaxed)) counts[kernel.name] += count;
    });
  });
  for (const auto& [name, count] : counts) counters->emplace_back(Text(backend, " ", name), count);
}

// The first fault since the last call, by `take(context, &text)` of each context that has launched; else its error.
template <class ForEach, class Take>
Status FirstFault(const ForEach& for_each, const Take& take) {
  std::string fault;
  Status error;
  // A device that is lost must not hide another's fault.
  for_each([&](auto* context) {
    if (!context->launched.load(std::memory_order_relaxed)) return;
    std::string text;
    Status status = take(context, &text);
    if (fault.empty()) fault = std::move(text);
    if (error.ok()) error = std::move(status);
  });
  return fault.empty() ? error : Status::Fault(std::move(fault));
}

}  // namespace ropewalk
