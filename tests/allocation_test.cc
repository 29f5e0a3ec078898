// No allocation on the call path after the first call: every malloc of this program is counted. On OpenCL, Level Zero
// and SYCL the run-time's own are none of ours: there counts what the calling thread allocates outside the run-time's
// functions.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "backends/level_zero/driver.h"
#include "backends/opencl/library.h"
#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/make_call.h"
#include "tests/opencl_runtime.h"
#include "tests/sycl_memory.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ROPEWALK_OWN_MALLOC 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ROPEWALK_OWN_MALLOC 0
#endif
#endif
#if !defined(ROPEWALK_OWN_MALLOC) && defined(__GLIBC__)
#define ROPEWALK_OWN_MALLOC 1
#endif

namespace {
std::atomic<long> allocations{0};
thread_local int inside_runtime = 0;
thread_local long own_allocations = 0;
int (*inside_shim)() = nullptr;  // of a library, as the first
}  // namespace

#if ROPEWALK_OWN_MALLOC
namespace {
void Count() {
  ++allocations;
  if (inside_runtime == 0 && !(inside_shim && inside_shim())) ++own_allocations;
}
}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

// The C library's own functions underneath; operator new comes here too.
void* malloc(size_t size) {
  Count();
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  Count();
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  Count();
  return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  Count();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}
}
#endif

namespace ropewalk {
namespace {

class Allocation : public testing::Test {
 protected:
  void SetUp() override {
#if !ROPEWALK_OWN_MALLOC
    GTEST_SKIP() << "malloc cannot be counted here";
#endif
  }
};

long AllocationsOf(const ropewalk_rope_args& args) {
  EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  const long before = allocations;
  const int code = ropewalk_rope(&args, nullptr);
  const long after = allocations;
  EXPECT_EQ(code, ROPEWALK_OK);
  return after - before;
}

TEST_F(Allocation, TheCounterCounts) {
  const long before = allocations, own_before = own_allocations;
  const std::unique_ptr<char[]> memory(new char[1000]);
  EXPECT_GT(allocations, before) << static_cast<void*>(memory.get());
  EXPECT_GT(own_allocations, own_before);
}

TEST_F(Allocation, NoneInACallOfAnyStage) {
  int calls = 0;
  for (size_t i = 0; i < RopeCases().size(); i += 3) {
    const RopeCase& c = RopeCases()[i];
    if (c.bad != Bad::kNone) continue;  // a fault's text is made when it is met
    std::unique_ptr<CaseCall> call;
    ASSERT_TRUE(CaseCall::Make(c, HostMemory(), &call).ok()) << c.name;
    ASSERT_EQ(AllocationsOf(call->args()), 0) << c.name;
    ++calls;
  }
  EXPECT_GT(calls, 500);
}

// Every function of a run-time that the backend calls, with the run-time's own allocations left out.
template <int kPlace, class Result, class... Args>
struct Runtime {
  static inline Result (*real)(Args...) = nullptr;
  static Result Call(Args... args) {
    ++inside_runtime;
    const Result result = real(args...);
    --inside_runtime;
    return result;
  }
  static auto Wrap(Result (*function)(Args...)) {
    real = function;
    return function ? &Call : nullptr;
  }
};

long OwnAllocationsOf(CaseCall& call, void* stream) {
  const auto run = [&] { EXPECT_EQ(ropewalk_rope(&call.args(), stream), ROPEWALK_OK) << ropewalk_last_error(); };
  run();
  const long before = own_allocations;
  run();
  run();
  return own_allocations - before;
}

// Of the cases that `which` chooses; returns how many there were.
template <class Which>
int ExpectNoneOfOurs(DeviceMemory& memory, const Which& which) {
  int calls = 0;
  for (const RopeCase& c : RopeCases()) {
    if (c.bad != Bad::kNone || !which(c)) continue;
    std::unique_ptr<CaseCall> call;
    EXPECT_TRUE(CaseCall::Make(c, memory, &call).ok()) << c.name;
    if (!call) return calls;
    EXPECT_EQ(OwnAllocationsOf(*call, memory.stream()), 0) << c.name;
    EXPECT_TRUE(memory.Synchronize().ok());  // before the memory goes
    if (testing::Test::HasFailure()) return calls;
    ++calls;
  }
  return calls;
}

TEST_F(Allocation, NoneOfOursOnOpenCl) {
  UseIntelRuntime();
  const OpenClLibrary& library = GetOpenCl();
  if (!library.status.ok()) {
    const char* required = std::getenv("ROPEWALK_TEST_OPENCL");
    ASSERT_FALSE(required && std::string_view(required) == "required") << library.status.text();
    GTEST_SKIP() << library.status.text();
  }
  auto& wrapped = const_cast<OpenClLibrary&>(library);
#define ROPEWALK_WRAP(name, symbol, ...) wrapped.name = Runtime<__COUNTER__, cl::Int, __VA_ARGS__>::Wrap(wrapped.name);
  ROPEWALK_OPENCL_FUNCTIONS(ROPEWALK_WRAP)
#undef ROPEWALK_WRAP
  // Of one dtype and head size, since every kernel takes the device seconds to build; all stages are in it.
  const auto some = [](const RopeCase& c) {
    return c.dtype == kF32 && c.head_dim == 64 && c.layout != Layout::kMisaligned;
  };
  ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
  EXPECT_GT(ExpectNoneOfOurs(HostMemory(), some), 50);
  EXPECT_GT(ExpectNoneOfOurs(OpenClMemory(), some), 50);
  ASSERT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
}

// On a stand-in for the driver, which runs nothing.
TEST_F(Allocation, NoneOfOursOnLevelZero) {
  if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  setenv("ROPEWALK_LIBZE_LOADER", ROPEWALK_FAKE_LIBZE, 1);
  const LevelZeroDriver& driver = GetLevelZeroDriver();
  ASSERT_TRUE(driver.status.ok()) << driver.status.text();
  auto& wrapped = const_cast<LevelZeroDriver&>(driver);
#define ROPEWALK_WRAP(name, symbol, ...) \
  wrapped.name = Runtime<__COUNTER__, ze::Result, __VA_ARGS__>::Wrap(wrapped.name);
  ROPEWALK_LEVEL_ZERO_FUNCTIONS(ROPEWALK_WRAP)
  ROPEWALK_LEVEL_ZERO_OPTIONAL(ROPEWALK_WRAP)
#undef ROPEWALK_WRAP
  int i = 0;
  EXPECT_GT(ExpectNoneOfOurs(LevelZeroMemory(), [&](const RopeCase&) { return ++i % 3 == 0; }), 500);
}

// The shim is our code too, but what it allocates cannot be told from what SYCL does.
TEST_F(Allocation, NoneOfOursOnASyclQueue) {
  if (!Device()) GTEST_SKIP() << missing;
  setenv("WRAPPED_SYCL_SHIM", ROPEWALK_SYCL_SHIM, 1);
  setenv("ROPEWALK_LIBSYCL_SHIM", ROPEWALK_WRAPPED_SYCL_SHIM, 1);
  void* library = dlopen(ROPEWALK_WRAPPED_SYCL_SHIM, RTLD_NOW);
  ASSERT_NE(library, nullptr) << dlerror();
  inside_shim = reinterpret_cast<int (*)()>(dlsym(library, "wrapped_sycl_shim_depth"));
  ASSERT_NE(inside_shim, nullptr);
  const auto some = [](const RopeCase& c) {
    return c.dtype == kF32 && c.head_dim == 64 && c.layout != Layout::kMisaligned;
  };
  SyclTestMemory memory;
  EXPECT_GT(ExpectNoneOfOurs(memory, some), 50);
}

TEST_F(Allocation, NoneWithThePool) {
  const auto call = MakeCall({.tokens = 600, .q_heads = 8, .head_dim = 128, .norm = true});
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  EXPECT_EQ(AllocationsOf(call->args()), 0);
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
}

}  // namespace
}  // namespace ropewalk
