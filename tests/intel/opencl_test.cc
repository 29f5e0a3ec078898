// The OpenCL backend on the machine's OpenCL device, as a rule Intel's run-time for CPUs (scripts/test.sh finds it in
// .venv): every conformance case on the very SPIR-V of the GPUs, tensors of a caller's context and queue, the exact
// variants of GPUs, the kernel from its text, threads, prepare(), faults, and refusals. Without a device the tests are
// skipped, unless ROPEWALK_TEST_OPENCL=required.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <ropewalk/compat.hpp>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "backends/opencl/library.h"
#include "backends/spirv/plan.h"
#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "conformance/variants.h"
#include "measure/place.h"
#include "tests/fresh_process.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The loader is opened once in a process, so each scenario has its own

void InFreshProcess(const Environment& changes, const std::function<void()>& body) {
  InChild([&] {
    UseIntelRuntime(ROPEWALK_INTEL_OPENCL);
    ChangeEnvironment({"ROPEWALK_LIBOPENCL", "ROPEWALK_OPENCL_DEVICE", "ROPEWALK_OPENCL_OPTIONS",
                       "ROPEWALK_OPENCL_SOURCE", "ROPEWALK_OPENCL_GENERAL", "FAKE_CL"},
                      changes);
    body();
  });
}

// False, and the test is skipped, where there is no device.
bool HasDevice() {
  if (GetOpenCl().status.ok()) return true;
  const char* required = std::getenv("ROPEWALK_TEST_OPENCL");
  EXPECT_FALSE(required && std::string_view(required) == "required")
      << GetOpenCl().status.text() << "; " << GetOpenCl().remedy;
  return false;
}
#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)
#define NEEDS_DEVICE() \
  if (!HasDevice()) GTEST_SKIP() << GetOpenCl().status.text()

void ExpectAllPass(const std::vector<RopeCase>& cases, DeviceMemory& memory, const std::string& what) {
  const RunSummary summary = RunCases(cases, memory, {.backend = "opencl"});
  ExpectPassed(summary, cases.size());
  for (const auto& [kernel, count] : summary.kernels) EXPECT_TRUE(kernel.starts_with("opencl ")) << kernel;
  if (summary.failed == 0) Report(Text(summary.run, " cases on ", GetOpenCl().devices.front().text, ": ", what));
}

std::vector<RopeCase> Every(size_t step, size_t from, const std::function<bool(const RopeCase&)>& which) {
  std::vector<RopeCase> cases;
  size_t i = 0;
  for (const RopeCase& c : RopeCases()) {
    if (which(c) && i++ % step == from) cases.push_back(c);
  }
  return cases;
}
// Few kernels, which are quick to build.
bool IsOf64(const RopeCase& c) { return c.head_dim == 64 && c.layout != Layout::kMisaligned; }
bool Float32Of64(const RopeCase& c) { return c.dtype == kF32 && IsOf64(c); }

// ---------------------------------------------------------------------------------------------------------------------
// Conformance. By dtype, as a process builds each kernel that it meets, and a kernel is of one dtype. One takes this
// device two seconds to build, so of the dtypes that differ in loads and stores alone the heads of 64, which need few
// kernels (those of float32 in TensorsOfACallersContext); `make test-intel` runs all cases.

TEST(OpenClConformance, AllOfBFloat16) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectAllPass(Every(1, 0, [](const RopeCase& c) { return c.dtype == kBF16; }), HostMemory(), "all of bfloat16");
  });
}
TEST(OpenClConformance, Float16HeadsOf64) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    const auto cases = Every(1, 0, [](const RopeCase& c) { return c.dtype == kF16 && IsOf64(c); });
    ASSERT_GE(cases.size(), 200u);
    ExpectAllPass(cases, HostMemory(), "float16 of head_dim 64");
  });
}

// As on GPUs: the choices are specialisation constants. Most cases have a kernel of their own, which takes this device
// about a second to build, so these are as few as hold every pair of choices; `make test-intel` runs all cases so. The
// registers of a GPU decide how wide accesses are and how many units a lane keeps: pvc has 64 bytes, dg2 32.
void ExactVariants(const char* gpu, int register_bytes) {
  InFreshProcess({{"ROPEWALK_OPENCL_GENERAL", "0"}}, [&] {
    NEEDS_DEVICE();
    if (!GetOpenCl().devices.front().spirv) GTEST_SKIP() << "the device takes no SPIR-V";
    auto& device = const_cast<OpenClDevice&>(GetOpenCl().devices.front());
    device.properties.register_bytes = register_bytes;
    std::vector<RopeCase> cases = RopeCases();
    std::vector<SpirvVariant> variants;
    const Status status = SpirvVariantsOf(cases, device.properties, &variants);
    ASSERT_TRUE(status.ok()) << status.text();
    const size_t all = variants.size();
    variants = CoveringSpirvVariants(variants);
    std::set<std::string> names;
    for (const SpirvVariant& variant : variants) names.insert(variant.of);
    std::erase_if(cases, [&](const RopeCase& c) { return !names.contains(c.name); });
    ASSERT_EQ(cases.size(), variants.size());
    ExpectAllPass(cases, HostMemory(),
                  Text("specialised as on ", gpu, ", every pair of choices of its ", all, " variants"));
    size_t specialised = 0;
    const nlohmann::json counters = nlohmann::json::parse(ropewalk_counters());
    for (const auto& [kernel, count] : counters.items()) {
      if (kernel.starts_with("opencl ") && kernel.find(" general ") == std::string::npos) ++specialised;
    }
    EXPECT_EQ(specialised, variants.size());
  });
}
TEST(OpenClConformance, ExactVariantsOfPvc) { ExactVariants("pvc", 64); }
TEST(OpenClConformance, ExactVariantsOfDg2) { ExactVariants("dg2", 32); }

// A device that takes no SPIR-V is given the kernel's text.
TEST(OpenClConformance, FromSource) {
  InFreshProcess({{"ROPEWALK_OPENCL_SOURCE", "1"}}, [] {
    NEEDS_DEVICE();
    EXPECT_FALSE(GetOpenCl().devices.front().spirv);
    ExpectAllPass(Every(31, 3, [](const RopeCase& c) { return c.dtype == kF32; }), HostMemory(),
                  "built from source, every 31st of float32");
  });
}

// PoCL takes no SPIR-V and has no sub-groups: another compiler, another device, from the kernel's text. A general
// kernel takes it half a minute on some machines, so these are cases of few kernels.
TEST(OpenClConformance, OnPocl) {
  constexpr const char* kPocl = "/etc/OpenCL/vendors/pocl.icd";
  if (access(kPocl, R_OK) != 0) GTEST_SKIP() << "PoCL is not installed (apt-get install pocl-opencl-icd)";
  InFreshProcess({{"OCL_ICD_VENDORS", kPocl}, {"POCL_CACHE_DIR", ROPEWALK_POCL_CACHE}}, [] {
    NEEDS_DEVICE();
    const OpenClDevice& device = GetOpenCl().devices.front();
    EXPECT_NE(device.text.find("Portable Computing Language"), std::string::npos) << device.text;
    EXPECT_FALSE(device.spirv);
    ExpectAllPass(Every(3, 2, Float32Of64), OpenClMemory(), "PoCL, from source, every 3rd of float32 of head_dim 64");
  });
}

// A caller's context, queue and shared virtual memory.
TEST(OpenClConformance, TensorsOfACallersContext) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectAllPass(Every(1, 0, Float32Of64), OpenClMemory(),
                  "kDLOpenCL tensors on a caller's queue, float32 of head_dim 64");
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient of norm and rotation. Few kernels are built: those of heads of 64 and of what the random ones draw

std::vector<RopeCase> Gradients(size_t step, const std::function<bool(const RopeCase&)>& which) {
  std::vector<RopeCase> cases;
  size_t i = 0;
  for (const RopeCase& c : BackwardCases(1)) {
    if (which(c) && (c.norm || c.weight != Weight::kNone) && i++ % step == 0) cases.push_back(c);
  }
  return cases;
}
void ExpectGradients(const std::vector<RopeCase>& cases, DeviceMemory& memory, const std::string& what) {
  ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
  ExpectGradientsPass(cases, memory, "opencl", Text(GetOpenCl().devices.front().text, ": ", what));
}

TEST(OpenClGradient, BFloat16) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectGradients(Gradients(3, [](const RopeCase& c) { return c.dtype == kBF16; }), HostMemory(),
                    "every 3rd of bfloat16");
  });
}
TEST(OpenClGradient, Float16HeadsOf64) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectGradients(Gradients(2, [](const RopeCase& c) { return c.dtype == kF16 && IsOf64(c); }), HostMemory(),
                    "every 2nd of float16 of head_dim 64");
  });
}
TEST(OpenClGradient, Random) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectGradients(RandomBackwardCases(11, 60), HostMemory(), "random ones");
  });
}
// On a caller's queue, in the caller's memory.
TEST(OpenClGradient, OfACallersContext) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ExpectGradients(Gradients(4, Float32Of64), OpenClMemory(), "a caller's queue, every 4th of float32 of head_dim 64");
  });
}
TEST(OpenClGradient, FromSource) {
  InFreshProcess({{"ROPEWALK_OPENCL_SOURCE", "1"}}, [] {
    NEEDS_DEVICE();
    ExpectGradients(Gradients(7, Float32Of64), HostMemory(), "built from source, every 7th of float32 of head_dim 64");
  });
}
// As on GPUs, specialised: as few as hold every pair of a module, units and sums.
void ExactGradients(const char* gpu, int register_bytes) {
  InFreshProcess({{"ROPEWALK_OPENCL_GENERAL", "0"}}, [&] {
    NEEDS_DEVICE();
    if (!GetOpenCl().devices.front().spirv) GTEST_SKIP() << "the device takes no SPIR-V";
    auto& device = const_cast<OpenClDevice&>(GetOpenCl().devices.front());
    device.properties.register_bytes = register_bytes;
    std::vector<RopeCase> cases = BackwardCases(1);
    std::vector<SpirvVariant> variants;
    const Status status = SpirvBackwardVariantsOf(cases, device.properties, &variants);
    ASSERT_TRUE(status.ok()) << status.text();
    const size_t all = variants.size();
    variants = FewCovering(variants, [](const RopeSpirvKey& key) {
      const auto& c = key.constants;
      return std::vector<int>{key.entry, key.dtype * 16 + key.vector, c[kRopeSpecUnits], c[kRopeSpecLanes] != 0,
                              c[kRopeSpecSums]};
    });
    std::set<std::string> names;
    for (const SpirvVariant& variant : variants) names.insert(variant.of);
    std::erase_if(cases, [&](const RopeCase& c) { return !names.contains(c.name); });
    ExpectGradients(cases, HostMemory(), Text("specialised as on ", gpu, ", ", names.size(), " of ", all, " variants"));
  });
}
TEST(OpenClGradient, ExactVariantsOfPvc) { ExactGradients("pvc", 64); }
TEST(OpenClGradient, ExactVariantsOfDg2) { ExactGradients("dg2", 32); }

// Sums of many rows, by sub-groups of which each has many; and the same bits each time.
TEST(OpenClGradient, SumsOverManyRows) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    std::vector<RopeCase> cases;
    for (const int64_t tokens : {1, 127, 20000}) {
      RopeCase c;
      c.dtype = c.weight_dtype = kF32;
      c.tokens = tokens;
      c.q_heads = 2;
      c.k_heads = 1;
      c.head_dim = 64;
      c.norm = true;
      c.weight = Weight::kPlain;
      c.name = Text("long", tokens);
      cases.push_back(c);
    }
    ExpectGradients(cases, HostMemory(), "1 to 20,000 rows");
    std::unique_ptr<CaseCall> call;
    ASSERT_TRUE(CaseCall::MakeBackward(cases.back(), HostMemory(), &call).ok());
    const auto sums = [&] {
      std::vector<float> all;
      EXPECT_TRUE(call->Reset().ok() && call->Run().ok());
      for (const DLTensor* sum : {call->gradients().q_weight_grad, call->gradients().k_weight_grad}) {
        if (!sum) continue;
        const auto* data = static_cast<const float*>(DataOf(*sum));
        all.insert(all.end(), data, data + 64);
      }
      return all;
    };
    const std::vector<float> first = sums();
    EXPECT_GE(first.size(), 64u);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(sums(), first);
  });
}
// The sum of nothing.
TEST(OpenClGradient, NoTokens) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
    RopeCase c;
    c.dtype = c.weight_dtype = kF32;
    c.tokens = 0;
    c.head_dim = 64;
    c.norm = true;
    c.weight = Weight::kPlain;
    for (const char* name : {"none", "none2", "none3"}) {  // some weights are frozen, by the name
      c.name = name;
      const CaseResult result = RunBackwardCase(c, HostMemory());
      EXPECT_TRUE(result.passed) << name << ": " << result.message;
    }
    EXPECT_EQ(std::string(ropewalk_counters()).find("backward+"), std::string::npos);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads, prepare(), faults

TEST(OpenClHost, ManyThreadsShareOneKernel) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
    // Shapes, strides and stages that differ in the arguments alone.
    std::vector<std::unique_ptr<CaseCall>> calls;
    for (int i = 0; i < 8; ++i) {
      calls.push_back(MakeCall({.dtype = kF32, .tokens = 5 + i, .head_dim = 64, .rotary_dim = 64, .norm = i % 2 != 0},
                               HostMemory()));
    }
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        CaseCall& call = *calls[static_cast<size_t>(t)];
        for (int repeat = 0; repeat < 50; ++repeat) {
          if (!call.Reset().ok() || !call.Run().ok() || !MessageOf(call).empty()) ++wrong;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
  });
}

// The drop-in functions of compat.hpp do on the caller's queue what they do on the host.
TEST(OpenClHost, CompatFunctions) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    constexpr int64_t kTokens = 5, kHeads = 3, kDim = 64, kRows = 9;
    std::vector<float> q(kTokens * kHeads * kDim), table(kRows * kDim);
    std::vector<int64_t> positions = {8, 0, 3, 3, 1};
    for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
    for (size_t i = 0; i < table.size(); ++i) table[i] = std::cos(0.37f * static_cast<float>(i));
    int64_t q_shape[] = {kTokens, kHeads, kDim}, table_shape[] = {kRows, kDim}, positions_shape[] = {kTokens};
    DeviceMemory& memory = OpenClMemory();
    const auto put = [&](const void* data, size_t bytes) {
      void* on = nullptr;
      EXPECT_TRUE(memory.Allocate(bytes, &on).ok() && memory.CopyIn(on, data, bytes).ok());
      return on;
    };
    void *device_table = put(table.data(), table.size() * 4), *device_positions = put(positions.data(), 5 * 8);
    for (const bool fused : {true, false}) {
      const auto run = [&](DLDevice device, void* q_data, void* table_data, void* positions_data, void* queue) {
        DLTensor dl_q = {q_data, device, 3, {kDLFloat, 32, 1}, q_shape, nullptr, 0};
        DLTensor dl_table = {table_data, device, 2, {kDLFloat, 32, 1}, table_shape, nullptr, 0};
        DLTensor dl_positions = {positions_data, device, 1, {kDLInt, 64, 1}, positions_shape, nullptr, 0};
        return fused ? compat::fused_qk_rope_with_cos_sin_cache_inplace(&dl_q, nullptr, &dl_table, &dl_positions, kDim,
                                                                        true, queue)
                     : compat::rotary_embedding(&dl_positions, &dl_q, nullptr, kDim, &dl_table, false, queue);
      };
      std::vector<float> want = q, got(q.size());
      ASSERT_TRUE(run({kDLCPU, 0}, want.data(), table.data(), positions.data(), nullptr));
      void* device_q = put(q.data(), q.size() * 4);
      const Result result = run(memory.device(), device_q, device_table, device_positions, memory.stream());
      ASSERT_TRUE(result) << result.text;
      ASSERT_TRUE(memory.Synchronize().ok() && memory.CopyOut(got.data(), device_q, q.size() * 4).ok());
      EXPECT_NE(want, q);
      for (size_t i = 0; i < q.size(); ++i) ASSERT_NEAR(got[i], want[i], 4e-7f) << i << " fused " << fused;
    }
  });
}

TEST(OpenClHost, FaultsAreTakenOnce) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
    const auto call = MakeCall({.dtype = kF32,
                                .tokens = 300,
                                .q_heads = 8,
                                .head_dim = 64,
                                .rotary_dim = 64,
                                .angles = Angles::kPacked,
                                .bad = Bad::kPosition},
                               HostMemory());
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(MessageOf(*call), "");
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
    EXPECT_NE(std::string(ropewalk_last_error()).find(call->expected_fault()), std::string::npos)
        << ropewalk_last_error();
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK);
  });
}

#ifdef ROPEWALK_FAKE_OPENCL
int Count(const char* symbol) {
  void* library = dlopen(ROPEWALK_FAKE_OPENCL, RTLD_NOW);
  auto* function = reinterpret_cast<int (*)()>(library ? dlsym(library, symbol) : nullptr);
  return function ? function() : -1;
}

Environment Fake(const char* words) { return {{"ROPEWALK_LIBOPENCL", ROPEWALK_FAKE_OPENCL}, {"FAKE_CL", words}}; }

TEST(OpenClHost, NothingIsBuiltAfterPrepare) {
  InFreshProcess(Fake(""), [] {
    NEEDS_DEVICE();
    for (DeviceMemory* memory : {&HostMemory(), &OpenClMemory()}) {
      ASSERT_EQ(ropewalk_force_backend("opencl"), ROPEWALK_OK) << ropewalk_last_error();
      const auto call = MakeCall({.dtype = kF32, .tokens = 3, .head_dim = 64, .rotary_dim = 64}, *memory);
      if (memory != &HostMemory()) {
        ASSERT_TRUE(call->Run().ok());  // its queue brings the context
      }
      ASSERT_EQ(ropewalk_prepare(&call->args()), ROPEWALK_OK) << ropewalk_last_error();
      const int builds = Count("fake_opencl_builds"), enqueues = Count("fake_opencl_enqueues");
      EXPECT_GT(builds, 0);
      ASSERT_TRUE(call->Reset().ok());
      ASSERT_TRUE(call->Run().ok());
      EXPECT_EQ(MessageOf(*call), "");
      EXPECT_EQ(Count("fake_opencl_builds"), builds);
      EXPECT_EQ(Count("fake_opencl_enqueues"), enqueues + 1);
      const std::string origin = Text("memory, from ", *RopeSpirvMissing() ? "source" : "SPIR-V");
      EXPECT_NE(std::string(ropewalk_explain(&call->args())).find(origin), std::string::npos);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals: a clear error each, and the process lives on

void ExpectRefusal(const Environment& environment, DeviceMemory& (*memory)(), std::string_view text) {
  InFreshProcess(environment, [&] {
    if (GetOpenCl().path != "libOpenCL.so.1" && !GetOpenCl().BuildProgram) GTEST_SKIP();
    std::unique_ptr<CaseCall> call;
    RopeCase c = {.dtype = kF32, .tokens = 3, .head_dim = 64, .rotary_dim = 64};
    c.name = CaseName(c);
    std::string error;
    if (ropewalk_force_backend("opencl") != ROPEWALK_OK) {
      error = ropewalk_last_error();
    } else if (const Status made = CaseCall::Make(c, memory(), &call); !made.ok()) {
      error = made.text();
    } else if (const Status ran = call->Run(); !ran.ok()) {
      error = ran.text();
      std::string touched;
      EXPECT_TRUE(call->VerifyUntouched(&touched).ok());
      EXPECT_EQ(touched, "");
    }
    EXPECT_NE(error.find(text), std::string::npos) << "the error is: " << error;
    ASSERT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK);
    const auto again = MakeCall(c, HostMemory());  // the CPU still serves
    EXPECT_TRUE(again->Run().ok());
    EXPECT_EQ(MessageOf(*again), "");
  });
}

TEST(OpenClRefuses, ADriverThatRefusesTheSpirv) {
  if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  ExpectRefusal(Fake("refuse_build"), HostMemory, "which refuses the SPIR-V; its log: ");
  ExpectRefusal(Fake("refuse_build"), HostMemory, "-no-such-option");  // of the log
  ExpectRefusal(Fake("refuse_il"), HostMemory, "clCreateProgramWithIL failed: CL_INVALID_BINARY");
}
TEST(OpenClRefuses, ADeviceWithoutSubGroupsOf16AndWithoutACompiler) {
  if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  ExpectRefusal(Fake("no_sub_groups no_compiler"), HostMemory, "has no sub-groups of 16 and no compiler");
  ExpectRefusal(Fake("no_spirv no_compiler"), HostMemory, "takes no SPIR-V and has no compiler");
}
TEST(OpenClRefuses, ADeviceWithout16BitFloatsAndWithoutACompiler) {
  if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  ExpectRefusal(Fake("no_float16 no_compiler"), HostMemory, "has no 16-bit floats (cl_khr_fp16) and no compiler");
}
TEST(OpenClRefuses, ADeviceWithoutSharedMemory) {
  ExpectRefusal(Fake("no_svm"), HostMemory, "has neither shared virtual memory nor cl_intel_unified_shared_memory");
}
TEST(OpenClRefuses, HostTensorsOnADeviceWithMemoryOfItsOwn) {
  ExpectRefusal(Fake("no_system"), HostMemory, "does not work on the memory of the process");
}
TEST(OpenClRefuses, AQueueOfAnotherDevice) {
  ExpectRefusal(Fake("other_device"), OpenClMemory, "but the queue is one of another device");
}

// Memory that the driver manages: the arguments are bound anew at each call.
TEST(OpenClHost, DevicesWithMemoryOfTheirOwn) {
  InFreshProcess(Fake("no_system"), [] {
    NEEDS_DEVICE();
    EXPECT_FALSE(OpenClWorksOnHost());
    ExpectAllPass(Every(4, 1, Float32Of64), OpenClMemory(),
                  "memory of the device's own, every 4th of float32 of head_dim 64");
  });
}
// Where it holds 16-bit floats in memory alone.
TEST(OpenClHost, DevicesWithout16BitFloats) {
  InFreshProcess(Fake("no_float16"), [] {
    NEEDS_DEVICE();
    EXPECT_FALSE(GetOpenCl().devices.front().spirv);
    ExpectAllPass(Every(400, 5, [](const RopeCase& c) { return c.dtype == kF16; }), HostMemory(),
                  "without 16-bit floats, from source, every 400th of float16");
  });
}
// Without sub-groups of 16 the kernel is built from its text.
TEST(OpenClHost, DevicesWithoutSubGroupsOf16) {
  InFreshProcess(Fake("no_sub_groups"), [] {
    NEEDS_DEVICE();
    EXPECT_FALSE(GetOpenCl().devices.front().spirv);
    ExpectAllPass(Every(200, 5, [](const RopeCase& c) { return c.dtype == kF32; }), HostMemory(),
                  "without sub-groups, every 200th of float32");
  });
}
#endif

TEST(OpenClRefuses, AMissingLoader) {
  InFreshProcess({{"ROPEWALK_LIBOPENCL", "/nowhere/libOpenCL.so"}}, [] {
    EXPECT_NE(ropewalk_force_backend("opencl"), ROPEWALK_OK);
    const std::string error = ropewalk_last_error();
    EXPECT_NE(error.find("ROPEWALK_LIBOPENCL names /nowhere/libOpenCL.so, which cannot be opened"), std::string::npos)
        << error;
  });
}
TEST(OpenClRefuses, ADeviceThatIsNotThere) {
  InFreshProcess({{"ROPEWALK_OPENCL_DEVICE", "abacus"}}, [] {
    if (!GetOpenCl().BuildProgram) GTEST_SKIP();
    EXPECT_NE(ropewalk_force_backend("opencl"), ROPEWALK_OK);
    const std::string error = ropewalk_last_error();
    EXPECT_TRUE(error.find("ROPEWALK_OPENCL_DEVICE is \"abacus\"") != std::string::npos ||
                error.find("finds no driver") != std::string::npos)
        << error;
  });
}
#ifdef ROPEWALK_FAKE_OPENCL
// Nothing is timed on a device with memory of its own; that is said at once, and what there is instead.
TEST(OpenClRefuses, Timing) {
  InFreshProcess(Fake("no_system"), [] {
    NEEDS_DEVICE();
    bench::Place* place = nullptr;
    EXPECT_HAS(bench::PlaceOf("opencl", &place).text(),
               "backend must be cpu, cuda, or opencl where the device works on the CPU's memory, to be timed, but is "
               "opencl; ropewalk check --backend opencl");
    EXPECT_HAS(bench::PlaceOf("intel", &place).text(), "but is intel; ropewalk check --backend intel");
  });
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    bench::Place* place = nullptr;
    EXPECT_TRUE(bench::PlaceOf("opencl", &place).ok());
    EXPECT_EQ(place, &bench::HostPlace());
  });
}
#endif
TEST(OpenClRefuses, APart) {
  InFreshProcess({}, [] {
    NEEDS_DEVICE();
    EXPECT_NE(ropewalk_force_backend("opencl:fast"), ROPEWALK_OK);
    EXPECT_NE(std::string(ropewalk_last_error()).find("opencl has no parts"), std::string::npos);
  });
}

}  // namespace
}  // namespace ropewalk
