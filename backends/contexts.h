// What the backends of GPUs do alike: a driver that is not there, the contexts of a driver that have been met, launches
// counted and faults gathered from them. `for_each(visit)` calls visit(context) for each context that has been met.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
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

// The contexts of a driver that have been met, for each of its devices: the backend's own one, and those of callers.
// Found without a lock. Never destroyed, as the driver may be gone before our destructors run.
// A Context has a member `next`. Only for constinit objects: a child of fork() starts without contexts by Forget (see
// base/fork.h), as those of the driver, and threads that hold the lock, are its parent's.
template <class Context>
class ContextLists {
 public:
  struct OfDevice {
    std::atomic<Context*> own{nullptr};
    std::atomic<Context*> others{nullptr};

    template <class Is>
    Context* FindOther(const Is& is) const {
      for (Context* context = others.load(std::memory_order_acquire); context; context = context->next) {
        if (is(*context)) return context;
      }
      return nullptr;
    }
    // Under the lock.
    void AddOther(Context* context) {
      context->next = others.load(std::memory_order_relaxed);
      others.store(context, std::memory_order_release);
    }
  };

  // Of the driver's `devices` devices.
  std::vector<OfDevice>& All(size_t devices) {
    if (auto* known = lists_.load(std::memory_order_acquire)) return *known;
    const std::lock_guard lock(mutex);
    if (!lists_.load(std::memory_order_relaxed)) {
      lists_.store(new std::vector<OfDevice>(devices), std::memory_order_release);
    }
    return *lists_.load(std::memory_order_relaxed);
  }
  template <class Visit>
  void ForEach(size_t devices, const Visit& visit) {
    for (const OfDevice& contexts : All(devices)) {
      if (Context* own = contexts.own.load(std::memory_order_acquire)) visit(own);
      for (Context* c = contexts.others.load(std::memory_order_acquire); c; c = c->next) visit(c);
    }
  }
  void Forget() {
    new (&mutex) std::mutex;
    lists_.store(nullptr);
  }

  std::mutex mutex;  // for who adds one

 private:
  std::atomic<std::vector<OfDevice>*> lists_{nullptr};
};

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
