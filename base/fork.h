// fork() while other threads are in our code: what the child finds.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <mutex>
#include <new>

namespace ropewalk {

// A lock over data that a forked child goes on using: fork() takes it first, so that no other thread holds it then.
// Such locks are constinit and held for moments. A thread never holds two, and calls no code of others under one, as
// that might fork. Locks over what belongs to a driver are made anew in the child instead, see OnFork.
class ForkMutex {
 public:
  constexpr ForkMutex() = default;
  void lock();
  void unlock() { mutex_.unlock(); }

 private:
  friend struct ForkMutexes;
  std::mutex mutex_;
  ForkMutex* next_ = nullptr;
  std::atomic<bool> listed_{false};
};

// `forget` runs in each forked child: makes new what another thread of the parent may have held or been changing. It
// may do nothing but write memory. One static object for each.
class OnFork {
 public:
  explicit OnFork(void (*forget)());

 private:
  friend struct ForkMutexes;
  void (*const forget_)();
  OnFork* next_;
};

// One object of the process: made by `kMake` when it is first wanted, never destroyed, so that calls while the process
// ends have it too. Unlike a static variable of a function, a child that was forked while another thread made it does
// not wait for that.
template <class T, const T* (*kMake)()>
class OnceMade {
 public:
  static const T& Get() {
    if (const T* ready = made.load(std::memory_order_acquire)) return *ready;
    (void)&kForgetMaking;
    const std::lock_guard lock(making);
    const T* object = made.load(std::memory_order_relaxed);
    if (!object) made.store(object = kMake(), std::memory_order_release);
    return *object;
  }
  static bool WasMade() { return made.load(std::memory_order_acquire) != nullptr; }

 private:
  static inline std::atomic<const T*> made{nullptr};
  static inline std::mutex making;
  static inline const OnFork kForgetMaking{[] { new (&making) std::mutex; }};
};

}  // namespace ropewalk
