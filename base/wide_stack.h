// Work of others that needs more stack than a small thread has: drivers that look for devices, compilers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>

#include <cstddef>
#include <exception>

namespace ropewalk {

// What is left of the calling thread's stack, or `otherwise` where the system cannot say.
inline size_t StackLeft(size_t otherwise) {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return otherwise;
  void* lowest = nullptr;
  size_t size = 0;
  const bool known = pthread_attr_getstack(&attributes, &lowest, &size) == 0;
  pthread_attr_destroy(&attributes);
  // Not the address of a variable, which sanitizers may keep elsewhere.
  const auto* const here = static_cast<const char*>(__builtin_frame_address(0));
  const auto* const bottom = static_cast<const char*>(lowest);
  return known && here > bottom && here <= bottom + size ? static_cast<size_t>(here - bottom) : otherwise;
}

// Runs `work` here, or, if this thread has a small stack, on a thread of its own and waits for it. Not always there:
// a thread that is in dlopen holds the loader's lock, and another one's dlopen would wait for that. Where no thread can
// be made, `work` runs here too.
template <class Work>
void OnWideStack(const Work& work) {
  constexpr size_t kWide = size_t{8} << 20;
  constexpr size_t kEnough = size_t{1} << 20;  // with less, a thread was meant to be small
  struct Job {
    const Work* work;
    std::exception_ptr thrown;
  } job{&work, nullptr};
  const auto run = [](void* given) -> void* {
    auto* const its = static_cast<Job*>(given);
    try {
      (*its->work)();
    } catch (...) {
      its->thrown = std::current_exception();
    }
    return nullptr;
  };
  pthread_attr_t attributes;
  if (StackLeft(kEnough) >= kEnough || pthread_attr_init(&attributes) != 0) return work();
  pthread_t thread;
  const bool runs =
      pthread_attr_setstacksize(&attributes, kWide) == 0 && pthread_create(&thread, &attributes, run, &job) == 0;
  pthread_attr_destroy(&attributes);
  if (!runs) return work();
  int state = 0;
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);  // the other thread writes to this one's stack
  pthread_join(thread, nullptr);
  pthread_setcancelstate(state, nullptr);
  if (job.thrown) std::rethrow_exception(job.thrown);
}

}  // namespace ropewalk
