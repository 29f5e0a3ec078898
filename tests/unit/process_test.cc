// Calls at any place and moment of a process: on small stacks, while threads, pools and backends change, in children of
// fork(), in threads and processes that are ending, after dlclose(). What must never end in a crash runs in a child.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "backends/cpu/dispatch.h"
#include "base/environment.h"
#include "base/text.h"
#include "base/wide_stack.h"
#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/fresh_process.h"
#include "tests/run_cases.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define ROPEWALK_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define ROPEWALK_SANITIZED 1
#endif
#endif

namespace ropewalk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// Ends with this process, or with the signal SIGKILL after `seconds`.
template <class Body>
int StatusOfChild(int seconds, const Body& body) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    try {
      body();
    } catch (const std::exception& error) {  // else the child would go on as the test program
      std::fprintf(stderr, "in a child: %s\n", error.what());
      _exit(9);
    }
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  int status = -1;
  for (int i = 0; i < seconds * 1000; ++i) {
    if (waitpid(child, &status, WNOHANG) == child) return status;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return status;
}

// Large enough to be split, and small enough to be called often.
RopeCase Splittable() { return {.dtype = kF32, .tokens = 128, .q_heads = 8, .k_heads = 0, .head_dim = 64}; }

// A call whose first token's position is past the table.
RopeCase Faulty() {
  return {.dtype = kF32, .q_heads = 1, .k_heads = 0, .head_dim = 64, .angles = Angles::kTable, .bad = Bad::kPosition};
}

// ---------------------------------------------------------------------------------------------------------------------
// Small stacks

#ifdef ROPEWALK_SANITIZED
constexpr size_t kSmallStack = 4 << 20;  // what sanitizers add is none of ours
#else
constexpr size_t kSmallStack = 64 << 10;
#endif

// Runs the body on a stack with 16 MB around it that cannot be touched: a frame may not step over them.
void OnSmallStack(const std::function<void()>& body) {
  constexpr size_t kGuard = 16 << 20;
  const size_t size = std::max(kSmallStack, static_cast<size_t>(PTHREAD_STACK_MIN));  // 128 KB on aarch64
  char* memory = static_cast<char*>(
      mmap(nullptr, size + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + kGuard, size, PROT_READ | PROT_WRITE), 0);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  ASSERT_EQ(pthread_attr_setstack(&attributes, memory + kGuard, size), 0);
  pthread_t thread;
  const auto run = [](void* function) -> void* {
    (*static_cast<const std::function<void()>*>(function))();
    return nullptr;
  };
  ASSERT_EQ(pthread_create(&thread, &attributes, run, const_cast<std::function<void()>*>(&body)), 0);
  pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
  munmap(memory, size + 2 * kGuard);
}

std::vector<RopeCase> CasesForSmallStacks() {
  std::vector<RopeCase> cases;
  for (size_t i = 0; i < RopeCases().size(); i += 61) cases.push_back(RopeCases()[i]);
  // The longest heads, of parts that are no whole blocks.
  for (const uint32_t dtype : {kF32, kF16, kBF16}) {
    for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
      for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
        for (const bool norm : {false, true}) {
          cases.push_back({.dtype = dtype,
                           .tokens = 2,
                           .q_heads = 2,
                           .k_heads = 1,
                           .head_dim = 8192,
                           .rotary_dim = 8186,
                           .rotary_offset = 2,
                           .pairing = pairing,
                           .rounding = rounding,
                           .norm = norm,
                           .axes = Axes::kSections,
                           .cache = Cache::kFlat,
                           .cache_dtype = kE4M3,
                           .scale = Scale::kHost});
        }
      }
    }
  }
  return cases;
}

TEST(SmallStacks, EveryTargetServes) {
  int targets = 0;
  for (const CpuTarget& target : CpuTargets()) {
    if (!target.supported()) continue;
    ++targets;
    SCOPED_TRACE(target.name);
    ASSERT_EQ(ropewalk_force_backend((std::string("cpu:") + target.name).c_str()), ROPEWALK_OK);
    std::vector<std::unique_ptr<CaseCall>> calls;
    for (const RopeCase& c : CasesForSmallStacks()) calls.push_back(MakeCall(c));
    OnSmallStack([&] {
      for (const auto& call : calls) EXPECT_EQ(ropewalk_rope(&call->args(), nullptr), ROPEWALK_OK);
      ropewalk_check_faults();
    });
    for (const auto& call : calls) EXPECT_EQ(MessageOf(*call), "") << call->test_case().name;
  }
  EXPECT_GT(targets, 0);
  ASSERT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
}

TEST(SmallStacks, EveryOtherFunctionServes) {
  const std::string config = OurModel("llama-3.1-8b");
  ASSERT_FALSE(config.empty());
  const auto call = MakeCall(Splittable());
  std::vector<float> table(2 * 64 * 64);
  OnSmallStack([&] {
    EXPECT_EQ(ropewalk_prepare(&call->args()), ROPEWALK_OK);
    EXPECT_NE(ropewalk_explain(&call->args()), nullptr);
    EXPECT_NE(ropewalk_description(), nullptr);
    EXPECT_NE(ropewalk_torch_schema(), nullptr);
    EXPECT_NE(ropewalk_counters(), nullptr);
#ifndef ROPEWALK_SANITIZED  // whose stack is not small, and which the drivers that look for devices here do not go with
    EXPECT_NE(ropewalk_backends(), nullptr);
#endif
    ropewalk_frequencies* frequencies = nullptr;
    ASSERT_EQ(ropewalk_frequencies_from_config(config.c_str(), "config.json", nullptr, 0, &frequencies), ROPEWALK_OK)
        << ropewalk_last_error();
    int64_t shape[] = {64, 64};
    DLTensor cos = {table.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, nullptr, 0}, sin = cos;
    sin.data = table.data() + 64 * 64;
    EXPECT_EQ(ropewalk_frequencies_table(frequencies, &cos, &sin), ROPEWALK_OK) << ropewalk_last_error();
    ropewalk_frequencies_release(frequencies);
    const char* yarn = R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096})";
    ASSERT_EQ(ropewalk_frequencies_create(1e4, 8192, yarn, 0, &frequencies), ROPEWALK_OK) << ropewalk_last_error();
    ropewalk_frequencies_release(frequencies);
    EXPECT_NE(ropewalk_frequencies_create(1e4, 8191, yarn, 0, &frequencies), ROPEWALK_OK);
    EXPECT_STRNE(ropewalk_last_error(), "");
  });
}

TEST(SmallStacks, WorkOfOthersHasAWideOne) {
  OnSmallStack([] {
    int sum = 0;
    OnWideStack([&sum] {
      volatile char much[2 << 20];
      for (size_t i = 0; i < sizeof(much); i += 4096) much[i] = 1;
      for (size_t i = 0; i < sizeof(much); i += 4096) sum += much[i];
    });
    EXPECT_EQ(sum, 512);
    EXPECT_THROW(OnWideStack([] { throw std::bad_alloc(); }), std::bad_alloc);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// While others call

// Threads that call all the time, each its own tensors.
class Callers {
 public:
  Callers(int count, const RopeCase& c) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this, c] {
        const auto call = MakeCall(c);
        ropewalk_rope_args args = call->args();
        while (!stop_) {
          if (ropewalk_rope(&args, nullptr) != ROPEWALK_OK) ++wrong_;
          ++calls_;
        }
        // In place: what the calls before have left is of no use.
        if (!call->Reset().ok() || !call->Run().ok() || !MessageOf(*call).empty()) ++wrong_;
      });
    }
    while (calls_ < count) std::this_thread::yield();
  }
  ~Callers() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    EXPECT_EQ(wrong_, 0);
  }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> wrong_{0};
  std::atomic<long> calls_{0};
  std::vector<std::thread> threads_;
};

TEST(WhileOthersCall, ThePoolAndTheTargetChange) {
  const auto call = MakeCall(Splittable());
  {
    const Callers callers(3, Splittable());
    for (int round = 0; round < 10000; ++round) {
      ASSERT_EQ(ropewalk_set_threads(1 + round % 4), ROPEWALK_OK);
      const std::string target = CpuTargets()[static_cast<size_t>(round) % CpuTargets().size()].name;
      if (round % 16 == 0) (void)ropewalk_force_backend(round % 32 ? nullptr : ("cpu:" + target).c_str());
      if (round % 64 == 0) {
        ASSERT_TRUE(call->Reset().ok() && call->Run().ok());
        ASSERT_EQ(MessageOf(*call), "");
      }
    }
  }
  ASSERT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
}

// Pools are made and ended by several threads at once.
TEST(WhileOthersCall, ManySetTheThreads) {
  {
    const Callers callers(2, Splittable());
    std::vector<std::thread> setters;
    for (int t = 0; t < 3; ++t) {
      setters.emplace_back([t] {
        for (int round = 0; round < 1000; ++round) {
          EXPECT_EQ(ropewalk_set_threads(1 + (round + t) % 5), ROPEWALK_OK);
          if (round % 8 == 0) std::this_thread::yield();
        }
      });
    }
    for (std::thread& thread : setters) thread.join();
  }
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
}

void Serially(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, const void*), const void* context,
              void*) {
  body(begin, end, context);
}

// Whatever lock of ours another thread holds when this one forks, the child gets on.
TEST(WhileOthersCall, TheProcessForks) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer allows no threads after fork()";
#endif
#ifdef __SANITIZE_ADDRESS__
  // GCC 12's has no handler of fork: a pool's new thread waited in SizeClassAllocator64 in one of 8 to 44 children.
  GTEST_SKIP() << "AddressSanitizer's allocator leaves a child the locks of other threads";
#endif
  ASSERT_EQ(ropewalk_set_threads(3), ROPEWALK_OK);
  const auto call = MakeCall(Splittable());
  const auto faulty = MakeCall(Faulty());
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    while (!stop) (void)ropewalk_check_faults();
  });
  threads.emplace_back([&] {
    for (int i = 0; !stop; ++i) {
      ropewalk_set_threads(2 + i % 2);
      ropewalk_set_parallel_for(i % 2 ? Serially : nullptr, nullptr);
      ropewalk_set_parallel_for(nullptr, nullptr);
    }
  });
  {
    const Callers callers(2, Faulty()), poolers(1, Splittable());
    for (int round = 0; round < 100; ++round) {
      const int status = StatusOfChild(30, [&] {
        EXPECT_EQ(ropewalk_set_threads(2), ROPEWALK_OK);
        EXPECT_EQ(ropewalk_set_parallel_for(nullptr, nullptr), ROPEWALK_OK);
        EXPECT_TRUE(call->Reset().ok() && call->Run().ok());
        EXPECT_EQ(MessageOf(*call), "");
        (void)ropewalk_check_faults();
        EXPECT_TRUE(faulty->Reset().ok() && faulty->Run().ok());
        EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
        EXPECT_NE(ropewalk_counters(), nullptr);
      });
      ASSERT_EQ(status, 0) << "round " << round;
    }
    stop = true;
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
  (void)ropewalk_check_faults();
}

// A position, slot and axis is read once: what was checked is used. Under AddressSanitizer, or here by the guards of
// the table, another read shows.
TEST(WhileOthersCall, PositionsAndAxesChange) {
  constexpr int64_t kRows = 8, kPairs = 32;
  const long page = sysconf(_SC_PAGESIZE);
  char* memory =
      static_cast<char*>(mmap(nullptr, static_cast<size_t>(3 * page), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + page, static_cast<size_t>(page), PROT_READ | PROT_WRITE), 0);
  std::vector<float> q_data(64 * 64);
  std::vector<int64_t> position_data(2 * 64);
  std::vector<int32_t> axes_data(kPairs);
  int64_t q_shape[] = {64, 1, 64}, table_shape[] = {kRows, kPairs}, positions_shape[] = {2, 64},
          axes_shape[] = {kPairs};
  DLTensor q = {q_data.data(), {kDLCPU, 0}, 3, {kDLFloat, 32, 1}, q_shape, nullptr, 0};
  DLTensor table = {memory + page, {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, table_shape, nullptr, 0};
  DLTensor positions = {position_data.data(), {kDLCPU, 0}, 2, {kDLInt, 64, 1}, positions_shape, nullptr, 0};
  DLTensor axes = {axes_data.data(), {kDLCPU, 0}, 1, {kDLInt, 32, 1}, axes_shape, nullptr, 0};
  ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
  args.q = &q;
  args.cos = args.sin = &table;
  args.positions = &positions;
  args.axes = &axes;
  const int status = StatusOfChild(60, [&] {
    std::atomic<bool> stop{false};
    std::thread writer([&] {
      for (int64_t i = 0; !stop; ++i) {
        for (int64_t& position : position_data)
          __atomic_store_n(&position, i % 2 ? int64_t{1} << 40 : 3, __ATOMIC_RELAXED);
        for (int32_t& axis : axes_data) __atomic_store_n(&axis, i % 3 ? 0 : 1 << 30, __ATOMIC_RELAXED);
      }
    });
    for (int i = 0; i < 3000; ++i) EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK);
    stop = true;
    writer.join();
  });
  EXPECT_EQ(status, 0);
  munmap(memory, static_cast<size_t>(3 * page));
}

// ---------------------------------------------------------------------------------------------------------------------
// Beginning and ending

// The system refuses the pool its threads: the call is served by those that there are.
TEST(Ends, WithoutTheThreadsOfThePool) {
#ifdef ROPEWALK_SANITIZED
  GTEST_SKIP() << "sanitizers need more address space than the test leaves";
#endif
  for (const long megabytes : {1, 16, 40, 1024}) {
    const auto call = MakeCall(Splittable());
    const int status = StatusOfChild(60, [&] {
      long pages = 0;
      std::ifstream("/proc/self/statm") >> pages;
      const rlim_t most = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (megabytes << 20));
      rlimit limit = {most, RLIM_INFINITY};
      ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
      const int set = ropewalk_set_threads(1000), first = ropewalk_rope(&call->args(), nullptr);
      limit.rlim_cur = RLIM_INFINITY;  // for the test's own needs
      ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
      EXPECT_EQ(set, ROPEWALK_OK);
      EXPECT_EQ(first, ROPEWALK_OK);
      EXPECT_EQ(MessageOf(*call), "");
      const std::string explained = ropewalk_explain(&call->args());
      EXPECT_NE(explained.find("of which the system gave"), std::string::npos) << explained;
      EXPECT_TRUE(call->Reset().ok() && call->Run().ok());
      EXPECT_EQ(MessageOf(*call), "");
      EXPECT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
    });
    EXPECT_EQ(status, 0) << megabytes;
  }
}

void CallAll(const char* when) {
  const auto call = MakeCall(Splittable());
  if (!call->Run().ok() || !MessageOf(*call).empty()) std::fprintf(stderr, "%s: rope failed\n", when), _exit(2);
  ropewalk_rope_args empty = ROPEWALK_ROPE_ARGS_INIT;
  if (ropewalk_rope(&empty, nullptr) != ROPEWALK_INVALID_ARGUMENT ||
      !std::strstr(ropewalk_last_error(), "q is missing")) {
    std::fprintf(stderr, "%s: %s\n", when, ropewalk_last_error()), _exit(3);
  }
  if (!std::strstr(ropewalk_counters(), "cpu:")) std::fprintf(stderr, "%s: no counters\n", when), _exit(4);
  const auto faulty = MakeCall(Faulty());
  (void)ropewalk_check_faults();
  if (!faulty->Run().ok() || ropewalk_check_faults() != ROPEWALK_FAULT)
    std::fprintf(stderr, "%s: no fault\n", when), _exit(5);
  if (ropewalk_set_threads(2) != ROPEWALK_OK || !call->Reset().ok() || !call->Run().ok())
    std::fprintf(stderr, "%s: no pool\n", when), _exit(6);
}

struct CallsAtItsEnd {
  const char* when;
  ~CallsAtItsEnd() { CallAll(when); }
};

// In atexit handlers and in destructors of static objects, made before and after our own.
TEST(Ends, CallsAfterExitHasBegun) {
  const int status = StatusOfChild(60, [] {
    static const CallsAtItsEnd first{"a static object of before"};
    atexit([] { CallAll("atexit of before"); });
    CallAll("main");
    static const CallsAtItsEnd last{"a static object of after"};
    atexit([] { CallAll("atexit of after"); });
    exit(0);
  });
  EXPECT_EQ(status, 0);
}

// In destructors of a thread's objects and of its keys, before and after our own.
TEST(Ends, CallsInThreadsThatEnd) {
  static pthread_key_t early, late;
  const auto at_end = [](void* when) { CallAll(static_cast<const char*>(when)); };
  ASSERT_EQ(pthread_key_create(&early, at_end), 0);
  const int status = StatusOfChild(60, [&] {
    for (int i = 0; i < 3; ++i) {
      std::thread([&] {
        static thread_local const CallsAtItsEnd first{"a thread's object of before"};
        (void)&first;
        pthread_setspecific(early, "a key of before");
        CallAll("thread");
        static thread_local const CallsAtItsEnd last{"a thread's object of after"};
        (void)&last;
        if (i == 0) {
          EXPECT_EQ(pthread_key_create(&late, at_end), 0);
        }
        pthread_setspecific(late, "a key of after");
      }).join();
    }
  });
  EXPECT_EQ(status, 0);
  pthread_key_delete(early);
}

// The library unloaded while its pool has threads, and threads that have called go on.
TEST(Ends, TheLibraryIsClosed) {
  const auto call = MakeCall(Splittable());
  const int status = StatusOfChild(60, [&] {
    for (int round = 0; round < 8; ++round) {
      void* library = dlopen(ROPEWALK_LIBRARY, RTLD_NOW | RTLD_LOCAL);
      ASSERT_NE(library, nullptr) << dlerror();
      const auto set_threads =
          reinterpret_cast<decltype(&ropewalk_set_threads)>(dlsym(library, "ropewalk_set_threads"));
      const auto rope = reinterpret_cast<decltype(&ropewalk_rope)>(dlsym(library, "ropewalk_rope"));
      ASSERT_TRUE(set_threads && rope);
      std::atomic<bool> closed{false};
      std::atomic<int> called{0};
      ASSERT_EQ(set_threads(4), ROPEWALK_OK);
      std::thread caller([&] {
        for (int i = 0; i < 3; ++i) EXPECT_EQ(rope(&call->args(), nullptr), ROPEWALK_OK);
        ++called;
        while (!closed) std::this_thread::yield();
      });
      while (!called) std::this_thread::yield();
      EXPECT_EQ(dlclose(library), 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      closed = true;
      caller.join();  // what is kept for the thread ends with it
      EXPECT_EQ(StatusOfChild(30, [] {}), 0);
    }
  });
  EXPECT_EQ(status, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Other rights than the caller's

// In a process of its own, by the test below: what the system says of its rights, and whether a call is served.
TEST(Rights, DISABLED_Probe) {
  const auto call = MakeCall(Splittable());
  std::printf("secure %lu, code %d, variable %s\n", getauxval(AT_SECURE), ropewalk_rope(&call->args(), nullptr),
              EnvironmentVariable("ROPEWALK_CPU_TARGET") ? "read" : "not read");
}

// A caller of a setuid program must not say which code it loads: the variables are as if they were not set.
TEST(Rights, ASetuidProgramReadsNoVariables) {
#ifdef ROPEWALK_SANITIZED
  GTEST_SKIP() << "sanitizers are not for setuid programs";
#endif
  if (geteuid() != 0) GTEST_SKIP() << "only root can make a program of another user";
  // Beside this one, as the place for temporary files may be mounted without setuid.
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string copy = Text(self, ".", getpid(), ".setuid");
  const auto said = [&] {
    const std::string command = Text("ROPEWALK_CPU_TARGET=none '", copy,
                                     "' --gtest_also_run_disabled_tests --gtest_filter=Rights.DISABLED_Probe");
    std::string text;
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) return text;
    char line[512];
    while (fgets(line, sizeof(line), pipe)) text += line;
    pclose(pipe);
    const size_t begin = text.find("secure ");
    return begin == std::string::npos ? text : text.substr(begin, text.find('\n', begin) - begin);
  };
  std::filesystem::copy_file(self, copy);
  EXPECT_EQ(said(), "secure 0, code 2, variable read") << "no such target";
  constexpr uid_t kNobody = 65534;
  const bool made = chown(copy.c_str(), kNobody, kNobody) == 0 && chmod(copy.c_str(), 04755) == 0;
  const std::string with_other_rights = made ? said() : "";
  std::filesystem::remove(copy);
  ASSERT_TRUE(made);
  if (with_other_rights.starts_with("secure 0")) GTEST_SKIP() << "programs here do not change their user";
  EXPECT_EQ(with_other_rights, "secure 1, code 0, variable not read");
}

}  // namespace
}  // namespace ropewalk
