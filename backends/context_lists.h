// The contexts of a driver that have been met, for each of its devices: the backend's own one, and those of callers.
// Found without a lock. Never destroyed, as the driver may be gone before our destructors run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <mutex>
#include <new>
#include <vector>

namespace ropewalk {

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

}  // namespace ropewalk
