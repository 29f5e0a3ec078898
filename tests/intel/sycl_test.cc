// Calls on a SYCL queue: the shim and the kernel on Intel's CPU device, whose numbers are held to the reference; order,
// faults, threads, refusals. Without the run-times (pip install dpctl intel-opencl-rt) the tests are skipped.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <ropewalk/compat.hpp>
#include <string>
#include <thread>
#include <vector>

#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "conformance/runner.h"
#include "rope/arguments.h"
#include "tests/fresh_process.h"
#include "tests/intel/sycl_memory.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

std::string LastError() { return ropewalk_last_error(); }
#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)

// ---------------------------------------------------------------------------------------------------------------------
// Without SYCL: first, as a process that has opened it cannot fork

// The queue is not looked at before a shim is found, so that any address will do.
struct Unserved {
  float data[64] = {};
  int64_t shape[3] = {1, 1, 64};
  DLTensor q = {data, {static_cast<DLDeviceType>(kDlOneApi), 0}, 3, {kDLFloat, 32, 1}, shape, nullptr, 0};
  ropewalk_frequencies* frequencies = nullptr;
  ropewalk_rope_args args;
  Unserved() {
    EXPECT_EQ(ropewalk_frequencies_create(1e4, 64, nullptr, 0, &frequencies), ROPEWALK_OK);
    args.q = &q;
    args.frequencies = frequencies;
    args.sycl_queue = this;
  }
};

TEST(SyclAbsent, RefusesWithoutALibsycl) {
  InChild([] {
    unsetenv("ROPEWALK_LIBSYCL_SHIM");
    Unserved call;
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_UNAVAILABLE);
    EXPECT_EQ(LastError(), "rope: sycl_queue is given, but neither libsycl.so.9 nor libsycl.so.8 is loaded here");
  });
}

TEST(SyclAbsent, RefusesAForeignShim) {
  InChild([] {
    setenv("ROPEWALK_LIBSYCL_SHIM", "/nowhere/libropewalk_sycl9.so", 1);
    Unserved call;
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_UNAVAILABLE);
    EXPECT_HAS(LastError(), "rope: /nowhere/libropewalk_sycl9.so cannot be opened");
    setenv("ROPEWALK_LIBSYCL_SHIM", "libdl.so.2", 1);
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_UNAVAILABLE);
    EXPECT_HAS(LastError(), "rope: libdl.so.2 is not of this version of Ropewalk");
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// On the CPU device

SyclTestMemory& Memory() {
  static SyclTestMemory* const memory = new SyclTestMemory;
  return *memory;
}

class Sycl : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Device()) return;
    // Where the packages are installed, the device must be there; without it no test may begin.
    ASSERT_TRUE(*RopeSpirvMissing() || !fs::exists(ROPEWALK_INTEL_OPENCL) || !fs::exists(ROPEWALK_SYCL_SHIM))
        << missing;
    GTEST_SKIP() << missing;
  }
};

RopeCase Small() {
  RopeCase c;
  c.name = "small";
  return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

// The kernel itself is proved on the same device through OpenCL, by every case: here a sample, since a variant takes
// this device seconds to build. ROPEWALK_SYCL_ALL=1: all.
TEST_F(Sycl, Conformance) {
  std::vector<RopeCase> cases = RopeCases();
  if (const char* all = getenv("ROPEWALK_SYCL_ALL"); !all || *all != '1') {
    std::vector<RopeCase> sample;
    for (size_t i = 0; i < cases.size(); i += ROPEWALK_SYCL_STEP) sample.push_back(cases[i]);
    cases = std::move(sample);
  }
  const RunSummary sum = RunCases(cases, Memory(), {.backend = "intel"});
  ExpectPassed(sum, cases.size());
  for (const auto& [kernel, count] : sum.kernels)
    EXPECT_TRUE(kernel.starts_with("intel ") || kernel == "none") << kernel;
  if (sum.failed == 0) {
    Report(Text(sum.run, " cases on a SYCL queue (", ROPEWALK_LIBSYCL, ") of ", Device()->name(Memory().sycl_queue()),
                ": 1 in ", ROPEWALK_SYCL_STEP));
  }
}

// Queues that are not in order are made to be: what was submitted before is seen, what comes after sees the result.
TEST_F(Sycl, KeepsTheOrderOfAQueueWithoutOrder) {
  SyclTestMemory memory(/*in_order=*/false);
  RopeCase c = Small();
  c.tokens = 64;
  for (int round = 0; round < 20; ++round) {
    const auto call = MakeCall(c, memory);
    ropewalk_rope_args args = call->args();
    const size_t bytes = static_cast<size_t>(c.tokens * c.q_heads * c.head_dim * 2);
    void* q = static_cast<char*>(args.q->data) + args.q->byte_offset;
    std::vector<uint16_t> zeros(bytes / 2, 1), after(bytes / 2);
    ASSERT_EQ(ropewalk_prepare(&args), ROPEWALK_OK) << LastError();
    ASSERT_TRUE(Device()->fill_late(args.sycl_queue, q, 0, bytes)) << Device()->error();
    ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << LastError();
    ASSERT_TRUE(Device()->copy(args.sycl_queue, after.data(), q, bytes)) << Device()->error();
    ASSERT_TRUE(Device()->wait(args.sycl_queue)) << Device()->error();
    // Zeros rotated are zeros; had the kernel run too early, the late fill would still be ones of 50.
    for (const uint16_t bits : after) ASSERT_EQ(bits & 0x7fffu, 0u) << "round " << round;
  }
}

TEST_F(Sycl, FaultsAreTold) {
  RopeCase c = Small();
  for (const RopeCase& candidate : RopeCases()) {
    if (candidate.bad == Bad::kPosition && candidate.batch == 0) c = candidate;
  }
  ASSERT_EQ(c.bad, Bad::kPosition);
  const auto call = MakeCall(c, Memory());
  ASSERT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << LastError();
  ASSERT_EQ(ropewalk_rope(&call->args(), nullptr), ROPEWALK_OK) << LastError();
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);  // waits for the queue
  EXPECT_HAS(LastError(), "rope: positions[");
  EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << LastError();
}

TEST_F(Sycl, ThreadsWithQueuesOfTheirOwn) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      SyclTestMemory memory;
      const auto call = MakeCall(Small(), memory);
      for (int j = 0; j < 20; ++j) {
        ASSERT_TRUE(call->Reset().ok());
        const Status status = call->Run();
        ASSERT_TRUE(status.ok()) << status.text();
        ASSERT_EQ(MessageOf(*call), "");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(Sycl, ExplainNamesTheQueue) {
  const auto call = MakeCall(Small(), Memory());
  const char* text = ropewalk_explain(&call->args());
  ASSERT_NE(text, nullptr) << LastError();
  const nlohmann::json explanation = nlohmann::json::parse(text);
  EXPECT_EQ(explanation.at("backend"), "intel");
  EXPECT_HAS(explanation.at("device").get<std::string>(), "OpenCL");
  EXPECT_EQ(explanation.at("queue").get<std::string>(), "SYCL (" ROPEWALK_LIBSYCL ")");
}

// The drop-in functions of compat.hpp do on the queue what they do on the host.
TEST_F(Sycl, CompatFunctions) {
  constexpr int64_t kTokens = 5, kHeads = 3, kDim = 64, kRows = 9;
  std::vector<float> q(kTokens * kHeads * kDim), table(kRows * kDim);
  std::vector<int64_t> positions = {8, 0, 3, 3, 1};
  for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < table.size(); ++i) table[i] = std::cos(0.37f * static_cast<float>(i));
  int64_t q_shape[] = {kTokens, kHeads, kDim}, table_shape[] = {kRows, kDim}, positions_shape[] = {kTokens};
  const auto on = [&](DLDevice device, void* q_data, void* table_data, void* positions_data, bool fused, bool queue) {
    DLTensor dl_q = {q_data, device, 3, {kDLFloat, 32, 1}, q_shape, nullptr, 0};
    DLTensor dl_table = {table_data, device, 2, {kDLFloat, 32, 1}, table_shape, nullptr, 0};
    DLTensor dl_positions = {positions_data, device, 1, {kDLInt, 64, 1}, positions_shape, nullptr, 0};
    void* sycl_queue = queue ? Memory().sycl_queue() : nullptr;
    return fused ? compat::fused_qk_rope_with_cos_sin_cache_inplace(&dl_q, nullptr, &dl_table, &dl_positions, kDim,
                                                                    true, nullptr, nullptr, sycl_queue)
                 : compat::rotary_embedding(&dl_positions, &dl_q, nullptr, kDim, &dl_table, false, nullptr, nullptr,
                                            nullptr, nullptr, sycl_queue);
  };
  void *device_q = nullptr, *device_table = nullptr, *device_positions = nullptr;
  const size_t q_bytes = q.size() * 4, table_bytes = table.size() * 4, positions_bytes = positions.size() * 8;
  ASSERT_TRUE(Memory().Allocate(q_bytes, &device_q).ok());
  ASSERT_TRUE(Memory().Allocate(table_bytes, &device_table).ok());
  ASSERT_TRUE(Memory().Allocate(positions_bytes, &device_positions).ok());
  ASSERT_TRUE(Memory().CopyIn(device_table, table.data(), table_bytes).ok());
  ASSERT_TRUE(Memory().CopyIn(device_positions, positions.data(), positions_bytes).ok());
  const std::string refused = on(Memory().device(), device_q, device_table, device_positions, true, false).text;
  EXPECT_HAS(refused, "fused_qk_rope_with_cos_sin_cache_inplace: q is on xpu:0, but");
  for (const bool fused : {true, false}) {
    std::vector<float> want = q, got(q.size());
    ASSERT_TRUE(on({kDLCPU, 0}, want.data(), table.data(), positions.data(), fused, false));
    ASSERT_TRUE(Memory().CopyIn(device_q, q.data(), q_bytes).ok());
    const Result result = on(Memory().device(), device_q, device_table, device_positions, fused, true);
    ASSERT_TRUE(result) << result.text;
    ASSERT_TRUE(Memory().Synchronize().ok());
    ASSERT_TRUE(Memory().CopyOut(got.data(), device_q, q_bytes).ok());
    EXPECT_NE(want, q);
    for (size_t i = 0; i < q.size(); ++i) ASSERT_NEAR(got[i], want[i], 4e-7f) << i << " fused " << fused;
  }
  for (void* memory : {device_q, device_table, device_positions}) Memory().Free(memory);
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals; the process lives on

TEST_F(Sycl, RefusesMemoryOfTheHost) {
  const auto call = MakeCall(Small(), Memory());
  std::vector<uint16_t> host(static_cast<size_t>(5 * 2 * 128 + 64));
  DLTensor k = *call->args().k;
  k.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(host.data()) + 63) / 64 * 64);
  ropewalk_rope_args args = call->args();
  args.k = &k;
  EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_INVALID_ARGUMENT);
  EXPECT_HAS(LastError(), "rope: k must be unified shared memory of the context of sycl_queue (");
  std::string message;
  EXPECT_TRUE(call->VerifyUntouched(&message).ok());
  EXPECT_EQ(message, "");
}

TEST_F(Sycl, RefusesAStreamBesideTheQueue) {
  const auto call = MakeCall(Small(), Memory());
  int stream = 0;
  EXPECT_EQ(ropewalk_rope(&call->args(), &stream), ROPEWALK_INVALID_ARGUMENT);
  EXPECT_EQ(LastError(), "rope: sycl_queue and stream are both given: the work goes to one of them");
}

}  // namespace
}  // namespace ropewalk
