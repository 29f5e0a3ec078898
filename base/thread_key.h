// A pointer of each thread's own. Unlike a thread_local it has no destructor that later code of the thread could
// outlive, costs other threads nothing, and needs no memory but what it points to: where that cannot be had, it is
// null.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

namespace ropewalk {

class ThreadKey {
 public:
  // `make` returns null if there is no memory; `destroy` is called with what it made when the thread ends. Neither
  // throws. A call that the thread makes after that, from a destructor of its own, makes another.
  constexpr ThreadKey(void* (*make)(), void (*destroy)(void*)) : make_(make), destroy_(destroy) {}

  void* Get() { return Made(/*make=*/true); }
  // Null too if Get was not called yet.
  void* Find() { return Made(/*make=*/false); }

 private:
  void* Made(bool make);

  void* (*const make_)();
  void (*const destroy_)(void*);
  std::atomic<int64_t> key_{-1};  // a pthread_key_t once there is one
};

}  // namespace ropewalk
