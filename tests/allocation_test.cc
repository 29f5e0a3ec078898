// No allocation on the call path after the first call: every malloc of this program is counted.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <memory>

#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/make_call.h"

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
}

#if ROPEWALK_OWN_MALLOC
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

// The C library's own functions underneath; operator new comes here too.
void* malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  ++allocations;
  return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  ++allocations;
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
  const long before = allocations;
  const std::unique_ptr<char[]> memory(new char[1000]);
  EXPECT_GT(allocations, before) << static_cast<void*>(memory.get());
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

TEST_F(Allocation, NoneWithThePool) {
  const auto call = MakeCall({.tokens = 600, .q_heads = 8, .head_dim = 128, .norm = true});
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  EXPECT_EQ(AllocationsOf(call->args()), 0);
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
}

}  // namespace
}  // namespace ropewalk
