// Calls from many threads, the caller's parallel_for, the pool, and fork(): results are those of one thread, to the
// bit.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/run_cases.h"

#if defined(__SANITIZE_THREAD__)
#define ROPEWALK_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ROPEWALK_TSAN 1
#endif
#endif

namespace ropewalk {
namespace {

// Large enough to be split; packed, so that threads write into the same cache lines' neighbours.
RopeCase Splittable(int32_t pairing = ROPEWALK_NEOX) {
  return {.tokens = 301,
          .q_heads = 6,
          .k_heads = 2,
          .head_dim = 80,
          .rotary_dim = 60,
          .layout = Layout::kPacked,
          .pairing = pairing,
          .norm = true,
          .positions = Positions::kRandom,
          .cache = Cache::kHnd,
          .cache_dtype = kBF16,
          .v_dim = 80,
          .slots = Slots::kSkips};
}

std::vector<char> BytesOf(const DLTensor& tensor) {  // contiguous, of two bytes
  size_t count = 2;
  for (int i = 0; i < tensor.ndim; ++i) count *= static_cast<size_t>(tensor.shape[i]);
  const auto* data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  return {data, data + count};
}

class Threads : public testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(ropewalk_set_parallel_for(nullptr, nullptr), ROPEWALK_OK);
    EXPECT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << ropewalk_last_error();
  }
};

TEST_F(Threads, ManyCallAtOnce) {
  std::vector<const RopeCase*> cases;
  for (size_t i = 0; i < RopeCases().size(); i += 97) {
    if (RopeCases()[i].bad == Bad::kNone) cases.push_back(&RopeCases()[i]);
  }
  std::atomic<size_t> next{0};
  std::vector<std::string> messages(cases.size());
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < cases.size(); i = next++) {
        std::unique_ptr<CaseCall> call;
        Status status = CaseCall::Make(*cases[i], HostMemory(), &call);
        for (int repeat = 0; repeat < 3 && status.ok(); ++repeat) {
          status = call->Reset();
          if (status.ok()) status = call->Run();
        }
        messages[i] = status.ok() ? MessageOf(*call) : status.text();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < cases.size(); ++i) EXPECT_EQ(messages[i], "") << cases[i]->name;
}

// Threads that share inputs, frequencies and a cache, each with tokens of its own.
TEST_F(Threads, ShareFrequenciesAndCaches) {
  const auto call = MakeCall({.tokens = 64, .head_dim = 64, .cache = Cache::kFlat, .cache_dtype = kBF16, .v_dim = 64});
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int64_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const ropewalk_rope_args& all = call->args();
      DLTensor q = *all.q, k = *all.k, v = *all.v, positions = *all.positions, slots = *all.slots;
      int64_t q_shape[] = {8, 3, 64}, k_shape[] = {8, 2, 64}, count = 8;
      for (DLTensor* tensor : {&q, &k, &v}) {
        tensor->shape = tensor == &q ? q_shape : k_shape;
        tensor->byte_offset += static_cast<uint64_t>(2 * 8 * t * tensor->strides[0]);
      }
      for (DLTensor* tensor : {&positions, &slots}) {
        tensor->shape = &count;
        tensor->byte_offset += static_cast<uint64_t>(8 * 8 * t);
      }
      ropewalk_rope_args mine = all;
      mine.q = &q;
      mine.k = &k;
      mine.v = &v;
      mine.positions = &positions;
      mine.slots = &slots;
      if (ropewalk_rope(&mine, nullptr) != ROPEWALK_OK) ++wrong;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(MessageOf(*call), "");
}

TEST_F(Threads, ErrorsAreEachThreadsOwn) {
  ropewalk_rope_args args;
  ASSERT_NE(ropewalk_rope(&args, nullptr), ROPEWALK_OK);
  const std::string before = ropewalk_last_error();
  std::thread([] {
    EXPECT_STREQ(ropewalk_last_error(), "");
    EXPECT_NE(ropewalk_set_threads(0), ROPEWALK_OK);
    EXPECT_NE(std::string(ropewalk_last_error()).find("threads must be"), std::string::npos) << ropewalk_last_error();
  }).join();
  EXPECT_EQ(ropewalk_last_error(), before);
}

// ---------------------------------------------------------------------------------------------------------------------
// The caller's parallel_for

struct Splitter {
  std::mutex mutex;
  std::vector<std::pair<int64_t, int64_t>> ranges;
  int calls = 0;

  // Uneven ranges, last first, each in a thread of its own.
  static void ParallelFor(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                          const void* body_context, void* context) {
    auto& self = *static_cast<Splitter*>(context);
    std::vector<std::pair<int64_t, int64_t>> ranges;
    int64_t step = std::max<int64_t>(grain, 1);
    for (int64_t at = begin; at < end; at += step, step += 3) ranges.emplace_back(at, std::min(end, at + step));
    std::reverse(ranges.begin(), ranges.end());
    std::vector<std::thread> threads;
    for (const auto& [first, last] : ranges) threads.emplace_back(body, first, last, body_context);
    for (std::thread& thread : threads) thread.join();
    const std::lock_guard lock(self.mutex);
    ++self.calls;
    self.ranges = ranges;
  }
};

TEST_F(Threads, TheCallersParallelForDoesTheWork) {
  for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
    Splitter splitter;
    ASSERT_EQ(ropewalk_set_parallel_for(Splitter::ParallelFor, &splitter), ROPEWALK_OK);
    const auto call = MakeCall(Splittable(pairing));
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
    EXPECT_EQ(splitter.calls, 1);
    EXPECT_GT(splitter.ranges.size(), 2u);
    ASSERT_EQ(ropewalk_set_parallel_for(nullptr, nullptr), ROPEWALK_OK);
    const auto serial = MakeCall(Splittable(pairing));
    ASSERT_TRUE(serial->Run().ok());
    EXPECT_EQ(splitter.calls, 1);
    EXPECT_EQ(BytesOf(*call->args().k_cache), BytesOf(*serial->args().k_cache));
  }
}

// A thread that waits in the caller's parallel_for may be given another call of the same shape to make meanwhile;
// deeper than there are calls kept.
TEST_F(Threads, CallsInsideACallAreTheirOwn) {
  std::vector<std::unique_ptr<CaseCall>> calls;
  for (int i = 0; i < 7; ++i) calls.push_back(MakeCall(Splittable()));
  struct Nested {
    std::vector<std::unique_ptr<CaseCall>>* calls;
    size_t next = 1;
  } nested{&calls};
  const auto parallel_for = [](int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, const void*),
                               const void* body_context, void* context) {
    auto* n = static_cast<Nested*>(context);
    if (n->next < n->calls->size()) {
      const Status status = (*n->calls)[n->next++]->Run();
      EXPECT_TRUE(status.ok()) << status.text();
    }
    body(begin, end, body_context);
  };
  ASSERT_EQ(ropewalk_set_parallel_for(parallel_for, &nested), ROPEWALK_OK);
  for (int round = 0; round < 2; ++round) {
    nested.next = 1;
    ASSERT_TRUE(calls[0]->Run().ok());
    EXPECT_EQ(nested.next, calls.size());
    for (size_t i = 0; i < calls.size(); ++i) EXPECT_EQ(MessageOf(*calls[i]), "") << "call " << i;
    for (const auto& call : calls) ASSERT_TRUE(call->Reset().ok());
  }
}

TEST_F(Threads, FaultsNameTheFirstTokenHoweverWorkIsSplit) {
  RopeCase c = {.tokens = 900, .q_heads = 8, .head_dim = 128, .angles = Angles::kPacked, .bad = Bad::kPosition};
  Splitter splitter;
  ASSERT_EQ(ropewalk_set_parallel_for(Splitter::ParallelFor, &splitter), ROPEWALK_OK);
  const auto call = MakeCall(c);
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(MessageOf(*call), "");
  EXPECT_EQ(splitter.calls, 1);
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
  EXPECT_NE(std::string(ropewalk_last_error()).find("positions[1]"), std::string::npos) << ropewalk_last_error();
}

// ---------------------------------------------------------------------------------------------------------------------
// The pool

TEST_F(Threads, ThePoolGivesTheBitsOfOneThread) {
  for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
    RopeCase c = Splittable(pairing);
    c.layout = Layout::kSeparate;
    const auto serial = MakeCall(c);
    ASSERT_TRUE(serial->Run().ok());
    for (const int32_t threads : {2, 3, 8}) {
      ASSERT_EQ(ropewalk_set_threads(threads), ROPEWALK_OK);
      const auto call = MakeCall(c);
      for (int repeat = 0; repeat < 20; ++repeat) {
        ASSERT_TRUE(call->Reset().ok());
        ASSERT_TRUE(call->Run().ok());
        ASSERT_EQ(BytesOf(*call->args().q), BytesOf(*serial->args().q)) << threads << " threads";
      }
      EXPECT_EQ(MessageOf(*call), "");
    }
  }
}

TEST_F(Threads, ManyThreadsShareThePool) {
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&wrong, t] {
      const auto call = MakeCall(Splittable(t % 2 ? ROPEWALK_NEOX : ROPEWALK_INTERLEAVED));
      for (int repeat = 0; repeat < 20; ++repeat) {
        if (!call->Reset().ok() || !call->Run().ok()) ++wrong;
      }
      if (!MessageOf(*call).empty()) ++wrong;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(Threads, PoolSizesAreChecked) {
  for (const int32_t threads : {0, -1, 1 << 20, INT32_MIN}) {
    EXPECT_EQ(ropewalk_set_threads(threads), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_NE(std::string(ropewalk_last_error()).find(std::to_string(threads)), std::string::npos);
  }
  for (const int32_t threads : {4, 1, 2, 2}) {
    ASSERT_EQ(ropewalk_set_threads(threads), ROPEWALK_OK);
    const auto call = MakeCall(Splittable());
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// fork()

// Runs a call in a child process; true if it ended well within a minute.
bool ChildServes() {
  const auto call = MakeCall(Splittable());
  const pid_t child = fork();
  if (child == 0) {
    const bool served = call->Run().ok() && call->Reset().ok() && call->Run().ok();
    _exit(served && MessageOf(*call).empty() ? 0 : 1);
  }
  for (int i = 0; i < 6000; ++i) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

TEST_F(Threads, AChildServesAfterItsParentUsedThePool) {
#ifdef ROPEWALK_TSAN
  GTEST_SKIP() << "ThreadSanitizer allows no threads after fork()";
#endif
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  const auto call = MakeCall(Splittable());
  ASSERT_TRUE(call->Run().ok());
  EXPECT_TRUE(ChildServes());
  ASSERT_TRUE(call->Reset().ok());
  ASSERT_TRUE(call->Run().ok());  // the parent's pool is as it was
  EXPECT_EQ(MessageOf(*call), "");
}

TEST_F(Threads, AChildServesThoughThePoolWasBusy) {
#ifdef ROPEWALK_TSAN
  GTEST_SKIP() << "ThreadSanitizer allows no threads after fork()";
#endif
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  std::atomic<bool> stop{false};
  std::thread busy([&stop] {
    const auto call = MakeCall(Splittable());
    while (!stop) EXPECT_TRUE(call->Run().ok());
  });
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(ChildServes());
  stop = true;
  busy.join();
}

}  // namespace
}  // namespace ropewalk
