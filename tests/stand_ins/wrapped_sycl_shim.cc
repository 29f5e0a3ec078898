// A shim that says when the real one is at work, for tests/unit/allocation_test.cc: WRAPPED_SYCL_SHIM names that.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include <cstdlib>

#include "backends/intel/sycl/shim.h"

namespace ropewalk {
namespace {

// In the thread's first block: a later one would be allocated where it is asked for.
__attribute__((tls_model("initial-exec"))) thread_local int depth = 0;
const SyclShim* real = nullptr;

template <auto Function>
struct Wrapped;
template <class... Args, int (*SyclShim::*Function)(Args...)>
struct Wrapped<Function> {
  static int Call(Args... args) {
    ++depth;
    const int code = (real->*Function)(args...);
    --depth;
    return code;
  }
};

SyclShim wrapped;

}  // namespace
}  // namespace ropewalk

using namespace ropewalk;  // NOLINT: a library of C functions

extern "C" {

__attribute__((visibility("default"))) int wrapped_sycl_shim_depth() { return depth; }

__attribute__((visibility("default"))) const SyclShim* ropewalk_sycl_shim() {
  const char* path = std::getenv("WRAPPED_SYCL_SHIM");
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  auto* function = library ? reinterpret_cast<SyclShimFunction*>(dlsym(library, "ropewalk_sycl_shim")) : nullptr;
  if (!function) return nullptr;
  real = function();
  wrapped = {real->version,
             real->sycl,
             Wrapped<&SyclShim::find>::Call,
             Wrapped<&SyclShim::wrap>::Call,
             Wrapped<&SyclShim::launch>::Call,
             Wrapped<&SyclShim::allocate>::Call,
             Wrapped<&SyclShim::copy>::Call,
             Wrapped<&SyclShim::memory_of>::Call,
             Wrapped<&SyclShim::wait>::Call};
  return &wrapped;
}

}  // extern "C"
