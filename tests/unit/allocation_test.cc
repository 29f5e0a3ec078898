// No allocation on the call path after the first call: every malloc of this program is counted. And no call that ends
// in anything but a code when memory runs out: each of its allocations fails once, alone and with all later ones.
// On OpenCL, Level Zero
// and SYCL the run-time's own are none of ours: there counts what the calling thread allocates outside the run-time's
// functions.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "backends/intel/level_zero/driver.h"
#include "backends/opencl/library.h"
#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/fresh_process.h"
#include "tests/intel/sycl_memory.h"
#include "tests/run_cases.h"

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

// Of the calling thread: its allocations until the first that fails (negative: none does), and whether later ones do.
thread_local long allocations_left = -1;
thread_local bool later_ones_fail = false;
}  // namespace

#if ROPEWALK_OWN_MALLOC
namespace {
void Count() {
  ++allocations;
  if (inside_runtime == 0 && !(inside_shim && inside_shim())) ++own_allocations;
}
bool Fails() {
  if (allocations_left < 0) return false;
  if (allocations_left > 0) return --allocations_left, false;
  if (!later_ones_fail) allocations_left = -1;
  return true;
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
  return Fails() ? nullptr : __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  Count();
  return Fails() ? nullptr : __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  Count();
  return Fails() ? nullptr : __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  Count();
  return Fails() ? nullptr : __libc_memalign(alignment, size);
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

// ---------------------------------------------------------------------------------------------------------------------
// Out of memory

// A function of the C API with its arguments; true if it did what it is for.
struct Attempt {
  const char* name;
  std::function<bool()> call;
};

std::vector<Attempt> Attempts() {
  static const auto good = [] {
    std::unique_ptr<CaseCall> call;
    const RopeCase c = {.name = "out of memory", .dtype = kF32, .tokens = 300, .head_dim = 64, .norm = true};
    EXPECT_TRUE(CaseCall::Make(c, HostMemory(), &call).ok());
    return call;
  }();
  static const auto faulty = [] {
    std::unique_ptr<CaseCall> call;
    const RopeCase c = {.name = "fault", .dtype = kF32, .angles = Angles::kTable, .bad = Bad::kPosition};
    EXPECT_TRUE(CaseCall::Make(c, HostMemory(), &call).ok());
    return call;
  }();
  static ropewalk_rope_args refused;
  refused = good->args();
  refused.eps = -1;
  static const std::string config = OurModel("llama-3.1-8b");
  static const std::string broken = config.substr(0, config.size() / 2);
  const auto made = [](int code, ropewalk_frequencies* frequencies) {
    ropewalk_frequencies_release(frequencies);
    return code == ROPEWALK_OK;
  };
  const auto create = [made](const char* scaling) {
    ropewalk_frequencies* frequencies = nullptr;
    return made(ropewalk_frequencies_create(1e4, 64, scaling, 4096, &frequencies), frequencies);
  };
  const auto from_config = [made](const char* json) {
    ropewalk_frequencies* frequencies = nullptr;
    return made(ropewalk_frequencies_from_config(json, "config.json", nullptr, 0, &frequencies), frequencies);
  };
  return {
      {"rope", [] { return ropewalk_rope(&good->args(), nullptr) == ROPEWALK_OK; }},
      {"rope, refused", [] { return ropewalk_rope(&refused, nullptr) == ROPEWALK_INVALID_ARGUMENT; }},
      {"prepare", [] { return ropewalk_prepare(&good->args()) == ROPEWALK_OK; }},
      {"explain", [] { return ropewalk_explain(&good->args()) != nullptr; }},
      {"counters", [] { return ropewalk_counters() != nullptr; }},
      {"description", [] { return ropewalk_description() != nullptr; }},
      {"torch_schema", [] { return ropewalk_torch_schema() != nullptr; }},
      {"force_backend",
       [] { return ropewalk_force_backend("cpu") == ROPEWALK_OK && ropewalk_force_backend(nullptr) == ROPEWALK_OK; }},
      {"force_backend, refused", [] { return ropewalk_force_backend("xyz") == ROPEWALK_INVALID_ARGUMENT; }},
      {"faults",
       [] {
         return ropewalk_rope(&faulty->args(), nullptr) == ROPEWALK_OK && ropewalk_check_faults() == ROPEWALK_FAULT;
       }},
      {"set_threads",
       [] {
         const bool held =
             ropewalk_set_threads(3) == ROPEWALK_OK && ropewalk_rope(&good->args(), nullptr) == ROPEWALK_OK;
         return ropewalk_set_threads(1) == ROPEWALK_OK && held;
       }},
      {"frequencies_create", [=] { return create(nullptr); }},
      {"frequencies_create, yarn",
       [=] { return create(R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096})"); }},
      {"frequencies_create, refused", [=] { return !create(R"({"rope_type": ["yarn", {"a": [1, 2]}], "b": {}})"); }},
      {"frequencies_from_array",
       [=] {
         const double inv_freq[] = {1.0, 0.1};
         const int32_t axes[] = {0, 1};
         ropewalk_frequencies* frequencies = nullptr;
         return made(ropewalk_frequencies_from_array(inv_freq, 2, 1.0, axes, &frequencies), frequencies);
       }},
      {"frequencies_from_config", [=] { return from_config(config.c_str()); }},
      {"frequencies_from_config, broken", [=] { return !from_config(broken.c_str()); }},
      {"frequencies_table, refused",
       [] {
         int64_t shape[] = {4, 7};
         DLTensor table = {nullptr, {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, nullptr, 0};
         return ropewalk_frequencies_table(good->frequencies(), &table, &table) == ROPEWALK_INVALID_ARGUMENT;
       }},
  };
}

// In a thread of its own, whose first call it is. True if it did what it is for, so that no allocation was left to
// fail.
bool WithAllocations(const Attempt& attempt, long count, bool only_one) {
  bool held = false;
  std::string error;
  std::thread([&] {
    const auto call = attempt.call;
    later_ones_fail = !only_one;
    allocations_left = count;
    held = call();
    const char* said = ropewalk_last_error();
    allocations_left = -1;
    error = said;
    // And then it gets on.
    EXPECT_TRUE(call()) << attempt.name << ": " << ropewalk_last_error();
  }).join();
  EXPECT_TRUE(held || !error.empty()) << attempt.name << " after " << count;
  return held;
}

TEST_F(Allocation, EachThatFailsGivesACode) {
  for (const Attempt& attempt : Attempts()) {
    SCOPED_TRACE(attempt.name);
    ASSERT_TRUE(attempt.call()) << ropewalk_last_error();
    for (const bool only_one : {true, false}) {
      constexpr long kMost = 3000;
      long count = 0;
      // Some go on without what they could not have: that all later counts hold too is seen by a few more.
      for (int held = 0; held < 4 && count < kMost; ++count)
        held = WithAllocations(attempt, count, only_one) ? held + 1 : 0;
      EXPECT_LT(count, kMost);
    }
  }
}

// Memory is used up for good: what is served allocates nothing, and what is refused says why all the same.
TEST_F(Allocation, NoneIsNeededToServeOrToRefuse) {
  const std::vector<Attempt> attempts = Attempts();
  std::thread([&] {
    for (const Attempt& attempt : attempts) EXPECT_TRUE(attempt.call()) << attempt.name;
    const auto &rope = attempts[0].call, &refused = attempts[1].call;
    later_ones_fail = true;
    allocations_left = 0;
    const bool served = rope(), was_refused = refused();
    const std::string_view said = ropewalk_last_error();
    const bool again = rope();
    allocations_left = -1;
    EXPECT_TRUE(served && again);
    EXPECT_FALSE(was_refused);  // not by its own words: there was no memory for them
    EXPECT_EQ(said, "out of memory");
  }).join();
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
  UseIntelRuntime(ROPEWALK_INTEL_OPENCL);
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
