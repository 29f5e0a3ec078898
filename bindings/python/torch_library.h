// What the Python module takes of torch's libraries, where Python has loaded them: its threads, and whether somebody
// watches its operators.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <ropewalk/ropewalk.h>

#include <array>
#include <atomic>
#include <cstdint>

namespace ropewalk {

// torch_parallel_for of torch >= 2.10, found in the library that Python has loaded.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                     void* context);
inline TorchParallelFor torch_parallel_for = nullptr;
// OpenMP's threads do not survive fork(), and a parallel region would hang: a child works alone.
inline std::atomic<bool> is_forked_child = false;

inline void ParallelForByTorch(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                               const void* body_context, void*) {
  struct Task {
    void (*body)(int64_t, int64_t, const void*);
    const void* context;
  } task{body, body_context};
  const auto run = [](int64_t first, int64_t last, void* context) {
    const auto* t = static_cast<const Task*>(context);
    t->body(first, last, t->context);
  };
  if (is_forked_child.load(std::memory_order_relaxed) || torch_parallel_for(begin, end, grain, run, &task) != 0) {
    body(begin, end, body_context);
  }
}

inline bool UseTorchThreads() {
  if (torch_parallel_for) return ropewalk_set_parallel_for(ParallelForByTorch, nullptr) == ROPEWALK_OK;
  void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) return false;
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(dlsym(library, "torch_parallel_for"));
  if (!torch_parallel_for) return false;
  pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });
  return ropewalk_set_parallel_for(ParallelForByTorch, nullptr) == ROPEWALK_OK;
}

template <class Function>
Function FindInTorch(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  return handle ? reinterpret_cast<Function>(dlsym(handle, symbol)) : nullptr;
}

// c10::impl::tls_is_dispatch_key_included(DispatchKey) and at::impl::torch_function_mode_enabled(): a few instructions
// each, where Python's own ways to ask take 40 ns a question. Null: not found, and Python asks itself.
inline bool (*key_is_included)(uint16_t key) = nullptr;
inline bool (*function_mode_is_enabled)() = nullptr;
inline std::array<uint16_t, 4> watching_keys{};  // while one of them is included, somebody watches

// Modes, torch.jit.trace and torch.func would not see a call that goes past torch's operators.
inline bool SomebodyWatchesTorch() {
  if (!key_is_included) return false;
  for (const uint16_t key : watching_keys) {
    if (key_is_included(key)) return true;
  }
  return function_mode_is_enabled();
}

// `keys`: torch's dispatch keys that are included in a thread where somebody watches. Whether torch can be asked.
inline bool WatchTorch(const std::array<uint16_t, 4>& keys) {
  watching_keys = keys;
  function_mode_is_enabled = FindInTorch<bool (*)()>("libtorch_cpu.so", "_ZN2at4impl27torch_function_mode_enabledEv");
  const auto found =
      FindInTorch<bool (*)(uint16_t)>("libc10.so", "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE");
  if (function_mode_is_enabled) key_is_included = found;
  return key_is_included != nullptr;
}

}  // namespace ropewalk
