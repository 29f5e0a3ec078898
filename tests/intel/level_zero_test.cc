// The Level Zero backend: on the driver's own simulated GPUs (pvc and dg2: everything but the execution of kernels),
// and against a library that stands in for the loader, which shows what was launched and refuses what it is told to.
// Likewise for SYCL queues of Level Zero, and for what is refused of queues.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "backends/intel/level_zero/context.h"
#include "backends/spirv/plan.h"
#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "conformance/variants.h"
#include "rope/arguments.h"
#include "tests/fresh_process.h"
#include "tests/run_cases.h"
#include "tests/stand_ins/fake_intel.h"
#if __has_include(<level_zero/ze_api.h>)
#include <level_zero/ze_api.h>
#endif

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------------------
// Processes: a driver reads its settings when it is opened, and the simulated one writes files where it stands

Environment With(Environment environment, const Environment& more) {
  environment.insert(environment.end(), more.begin(), more.end());
  return environment;
}

void InFreshProcess(const Environment& changes, const std::function<void()>& body) {
  std::string directory = (fs::temp_directory_path() / "ropewalk-ze-XXXXXX").string();
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  InChild([&] {
    ChangeEnvironment({"ROPEWALK_LIBZE_LOADER", "FAKE_ZE_DEVICES", "FAKE_ZE_SUB_GROUPS", "FAKE_ZE_LACKS",
                       "FAKE_ZE_REFUSE", "ROPEWALK_LIBSYCL_SHIM", "ZE_AFFINITY_MASK"},
                      changes);
    ASSERT_EQ(chdir(directory.c_str()), 0);
    body();
  });
  fs::remove_all(directory);
}

nlohmann::json IntelBackend() {
  for (const auto& backend : nlohmann::json::parse(ropewalk_backends())) {
    if (backend.at("name") == "intel") return backend;
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// The ABI that we declare ourselves

#if __has_include(<level_zero/ze_api.h>)
TEST(LevelZeroAbi, IsThatOfTheHeader) {
#define SAME_SIZE(ours, theirs) EXPECT_EQ(sizeof(ze::ours), sizeof(theirs)) << #theirs
#define SAME(ours, member, theirs, their_member) \
  EXPECT_EQ(offsetof(ze::ours, member), offsetof(theirs, their_member)) << #theirs "::" #their_member
  SAME_SIZE(DeviceProperties, ze_device_properties_t);
  SAME(DeviceProperties, most_memory, ze_device_properties_t, maxMemAllocSize);
  SAME(DeviceProperties, threads_per_eu, ze_device_properties_t, numThreadsPerEU);
  SAME(DeviceProperties, simd_width, ze_device_properties_t, physicalEUSimdWidth);
  SAME(DeviceProperties, slices, ze_device_properties_t, numSlices);
  SAME(DeviceProperties, name, ze_device_properties_t, name);
  SAME_SIZE(ComputeProperties, ze_device_compute_properties_t);
  SAME(ComputeProperties, sub_group_sizes_count, ze_device_compute_properties_t, numSubGroupSizes);
  SAME(ComputeProperties, most_x, ze_device_compute_properties_t, maxGroupSizeX);
  SAME_SIZE(ModuleProperties, ze_device_module_properties_t);
  SAME(ModuleProperties, spirv_version, ze_device_module_properties_t, spirvVersionSupported);
  SAME(ModuleProperties, flags, ze_device_module_properties_t, flags);
  SAME_SIZE(QueueGroupProperties, ze_command_queue_group_properties_t);
  SAME(QueueGroupProperties, flags, ze_command_queue_group_properties_t, flags);
  SAME_SIZE(ContextDesc, ze_context_desc_t);
  SAME_SIZE(QueueDesc, ze_command_queue_desc_t);
  SAME(QueueDesc, mode, ze_command_queue_desc_t, mode);
  SAME_SIZE(DeviceMemoryDesc, ze_device_mem_alloc_desc_t);
  SAME_SIZE(AllocationProperties, ze_memory_allocation_properties_t);
  SAME(AllocationProperties, type, ze_memory_allocation_properties_t, type);
  SAME_SIZE(ModuleConstants, ze_module_constants_t);
  SAME_SIZE(ModuleDesc, ze_module_desc_t);
  SAME(ModuleDesc, options, ze_module_desc_t, pBuildFlags);
  SAME(ModuleDesc, constants, ze_module_desc_t, pConstants);
  SAME_SIZE(KernelDesc, ze_kernel_desc_t);
  SAME(KernelDesc, name, ze_kernel_desc_t, pKernelName);
  SAME_SIZE(KernelProperties, ze_kernel_properties_t);
  SAME(KernelProperties, spilled_bytes, ze_kernel_properties_t, spillMemSize);
  SAME(KernelProperties, most_sub_group_size, ze_kernel_properties_t, maxSubgroupSize);
  SAME_SIZE(Groups, ze_group_count_t);
  EXPECT_EQ(ze::kKernelProperties, uint32_t{ZE_STRUCTURE_TYPE_KERNEL_PROPERTIES});
  EXPECT_EQ(ze::kAllocationProperties, uint32_t{ZE_STRUCTURE_TYPE_MEMORY_ALLOCATION_PROPERTIES});
  EXPECT_EQ(ze::kModuleProperties, uint32_t{ZE_STRUCTURE_TYPE_DEVICE_MODULE_PROPERTIES});
  EXPECT_EQ(ze::kModuleFloat16, uint32_t{ZE_DEVICE_MODULE_FLAG_FP16});
  EXPECT_EQ(ze::kModuleDesc, uint32_t{ZE_STRUCTURE_TYPE_MODULE_DESC});
  EXPECT_EQ(ze::kQueueSynchronous, uint32_t{ZE_COMMAND_QUEUE_MODE_SYNCHRONOUS});
  EXPECT_EQ(ze::kQueueGroupCompute, uint32_t{ZE_COMMAND_QUEUE_GROUP_PROPERTY_FLAG_COMPUTE});
  EXPECT_EQ(ze::kInitGpuOnly, uint32_t{ZE_INIT_FLAG_GPU_ONLY});
  EXPECT_EQ(ze::kMemoryShared, uint32_t{ZE_MEMORY_TYPE_SHARED});
#undef SAME
#undef SAME_SIZE
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The driver's simulated GPUs

struct Simulated {
  const char* name;
  Environment environment;
};

void PrintTo(const Simulated& simulated, std::ostream* out) { *out << simulated.name; }

class LevelZeroSimulated : public ::testing::TestWithParam<Simulated> {};

// The cases that need different code, a few of each.
std::vector<RopeCase> Sample(size_t most, int register_bytes) {
  const std::vector<RopeCase> cases = RopeCases();
  std::vector<SpirvVariant> variants;
  EXPECT_TRUE(
      SpirvVariantsOf(cases, {.threads = 64, .max_local = 1024, .register_bytes = register_bytes}, &variants).ok());
  variants = CoveringSpirvVariants(variants);
  std::vector<RopeCase> sample;
  for (size_t i = 0; i < most && !variants.empty(); ++i) {
    const std::string& name = variants[i * variants.size() / most].of;
    for (const RopeCase& c : cases) {
      if (c.name == name) sample.push_back(c);
    }
  }
  return sample;
}

TEST_P(LevelZeroSimulated, BuildsAndLaunches) {
  if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  const std::vector<RopeCase> sample = Sample(8, std::string(GetParam().name) == "pvc" ? 64 : 32);
  InFreshProcess(GetParam().environment, [&] {
    const nlohmann::json backend = IntelBackend();
    if (!backend.at("available").get<bool>()) {
      const std::string detail = backend.at("detail");
#if defined(__x86_64__)  // under qemu, the machine's driver is not this program's
      // Where the packages are installed, the driver must be there.
      EXPECT_FALSE(fs::exists("/usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1")) << detail;
#endif
      std::printf("skipped: %s\n", detail.c_str());
      return;
    }
    int launched = 0;
    for (const RopeCase& c : sample) {
      std::unique_ptr<CaseCall> call;
      Status status = CaseCall::Make(c, LevelZeroMemory(), &call);
      ASSERT_TRUE(status.ok()) << c.name << ": " << status.text();
      ASSERT_EQ(ropewalk_prepare(&call->args()), ROPEWALK_OK) << c.name << ": " << ropewalk_last_error();
      const char* text = ropewalk_explain(&call->args());
      ASSERT_NE(text, nullptr) << ropewalk_last_error();
      const nlohmann::json explanation = nlohmann::json::parse(text);
      EXPECT_EQ(explanation.at("backend"), "intel");
      EXPECT_EQ(explanation.at("source"), "memory, from SPIR-V");
      EXPECT_EQ(explanation.at("spilled bytes"), "0") << explanation.dump();
      status = call->Run();
      ASSERT_TRUE(status.ok()) << c.name << ": " << status.text();
      ++launched;
    }
    int64_t counted = 0;
    const nlohmann::json counters = nlohmann::json::parse(ropewalk_counters());
    for (const auto& [kernel, count] : counters.items()) {
      if (kernel.starts_with("intel ")) counted += count.get<int64_t>();
    }
    EXPECT_EQ(counted, launched);
    Report(Text(launched, " variants built and launched, none executed, on Intel's simulated ", GetParam().name,
                " through ", backend.at("detail").get<std::string>()));
  });
}

const Environment kCommon = {{"NEOReadDebugKeys", "1"}, {"SetCommandStreamReceiver", "1"}};
INSTANTIATE_TEST_SUITE_P(All, LevelZeroSimulated,
                         ::testing::Values(Simulated{"pvc", With(kCommon, {{"ProductFamilyOverride", "pvc"},
                                                                           {"HardwareInfoOverride", "1x4x16"}})},
                                           Simulated{"dg2", With(kCommon, {{"ProductFamilyOverride", "dg2"},
                                                                           {"HardwareInfoOverride", "1x4x16"},
                                                                           {"OverrideMaxWorkgroupSize", "1024"}})}),
                         [](const auto& test) { return std::string(test.param.name); });

// ---------------------------------------------------------------------------------------------------------------------
// What is launched, on the stand-in

FakeZe& Fake() {
  static FakeZe& fake = FakeOf<FakeZe>(ROPEWALK_FAKE_LIBZE, "fake_ze");
  return fake;
}

const Environment kFake = {{"ROPEWALK_LIBZE_LOADER", ROPEWALK_FAKE_LIBZE}};

struct Call {
  void* context;
  DLTensor q, k, positions;
  int64_t q_shape[3], k_shape[3], positions_shape[1];
  ropewalk_frequencies* frequencies = nullptr;
  ropewalk_rope_args args;

  explicit Call(void* context_ = nullptr, int device = 0, int64_t tokens = 4, double theta = 10000.0)
      : context(context_), q_shape{tokens, 4, 128}, k_shape{tokens, 2, 128}, positions_shape{tokens} {
    if (!context) {  // our own: made by the first call that needs it
      LevelZeroContext* own = nullptr;
      EXPECT_TRUE(EnterLevelZero(GetLevelZeroDriver(), device, nullptr, &own).ok());
      context = own ? own->handle : nullptr;
    }
    const auto tensor = [&](int64_t* shape, int rank, DLDataType dtype) {
      int64_t count = 1;
      for (int i = 0; i < rank; ++i) count *= shape[i];
      void* data = Fake().allocate(context, device, static_cast<size_t>(std::max<int64_t>(count, 1) * dtype.bits / 8));
      return DLTensor{data, {static_cast<DLDeviceType>(kDlOneApi), device}, rank, dtype, shape, nullptr, 0};
    };
    q = tensor(q_shape, 3, {kDLBfloat, 16, 1});
    k = tensor(k_shape, 3, {kDLBfloat, 16, 1});
    positions = tensor(positions_shape, 1, {kDLInt, 64, 1});
    EXPECT_EQ(ropewalk_frequencies_create(theta, 128, nullptr, 0, &frequencies), ROPEWALK_OK);
    args.q = &q;
    args.k = &k;
    args.positions = &positions;
    args.frequencies = frequencies;
  }
  ~Call() { ropewalk_frequencies_release(frequencies); }
};

std::string LastError() { return ropewalk_last_error(); }
void* PointerOf(const std::string& argument) {
  void* pointer = nullptr;
  if (argument.size() == sizeof(pointer)) std::memcpy(&pointer, argument.data(), sizeof(pointer));
  return pointer;
}
#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)

class LevelZeroHost : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*RopeSpirvMissing()) GTEST_SKIP() << RopeSpirvMissing();
  }
};

TEST_F(LevelZeroHost, LaunchesWithTheArgumentsInOrder) {
  InFreshProcess(kFake, [] {
    Call call;
    ASSERT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    ASSERT_EQ(Fake().launches().size(), 1u);
    const FakeZeLaunch launch = Fake().launches()[0];
    RopeCall lowered;
    ASSERT_TRUE(LowerRope(call.args, nullptr, &lowered).ok());
    RopeSpirvPlan plan;
    ASSERT_TRUE(PlanRopeSpirv(lowered, GetLevelZeroDriver().devices[0].properties, &plan).ok());
    for (int i = 0; i < 3; ++i) EXPECT_EQ(launch.groups[i], plan.groups[i]);
    EXPECT_EQ(launch.group_size[0], plan.local);
    EXPECT_EQ(launch.group_size[1] * launch.group_size[2], 1u);
    EXPECT_EQ(launch.options, kRopeLevelZeroOptions);
    for (size_t i = 0; i < kRopeSpecCount; ++i) EXPECT_EQ(launch.constants[i], plan.key.constants[i]) << i;
    ASSERT_EQ(launch.arguments.size(), size_t{kRopeSpirvArguments});
    EXPECT_EQ(PointerOf(launch.arguments[0]), call.q.data);
    EXPECT_EQ(PointerOf(launch.arguments[1]), call.k.data);
    EXPECT_EQ(PointerOf(launch.arguments[2]), call.positions.data);
    EXPECT_EQ(launch.arguments[3], "");  // no offsets
    const auto* turns = static_cast<const uint64_t*>(PointerOf(launch.arguments[kRopeSpirvTurns]));
    ASSERT_NE(turns, nullptr);
    EXPECT_EQ(std::memcmp(turns, call.frequencies->turns.data(), 64 * sizeof(uint64_t)), 0);
    ASSERT_EQ(launch.arguments[kRopeSpirvPointers].size(), sizeof(rope_spirv_params));
    rope_spirv_params params;
    std::memcpy(&params, launch.arguments[kRopeSpirvPointers].data(), sizeof(params));
    EXPECT_EQ(params.params.tokens, 4);
    EXPECT_EQ(params.params.q_heads, 4);
    EXPECT_EQ(params.shape.lanes, plan.shape.lanes);
    EXPECT_EQ(params.shape.all_heads, plan.shape.all_heads);
    EXPECT_EQ(params.shape.page_multiplier, plan.shape.page_multiplier);
  });
}

// A gradient of norm and rotation, with both weights' sums.
struct GradientCall : Call {
  DLTensor q_grad, k_grad, weight, q_sums, k_sums, workspace;
  int64_t weight_shape[1] = {128}, workspace_shape[1] = {0};
  ropewalk_rope_gradients gradients;

  explicit GradientCall(void* context_ = nullptr, void* sycl_queue = nullptr) : Call(context_) {
    const auto tensor = [&](const DLTensor& like, int rank, int64_t* shape, DLDataType dtype) {
      int64_t count = 1;
      for (int i = 0; i < rank; ++i) count *= shape[i];
      DLTensor out = like;
      out.data = Fake().allocate(context, like.device.device_id, static_cast<size_t>(count * dtype.bits / 8));
      out.ndim = rank;
      out.shape = shape;
      out.dtype = dtype;
      return out;
    };
    q_grad = tensor(q, 3, q_shape, q.dtype);
    k_grad = tensor(k, 3, k_shape, k.dtype);
    weight = tensor(q, 1, weight_shape, q.dtype);
    q_sums = tensor(q, 1, weight_shape, {kDLFloat, 32, 1});
    k_sums = tensor(q, 1, weight_shape, {kDLFloat, 32, 1});
    args.q_weight = args.k_weight = &weight;
    args.sycl_queue = sycl_queue;
    gradients.q_grad = &q_grad;
    gradients.k_grad = &k_grad;
    gradients.q_weight_grad = &q_sums;
    gradients.k_weight_grad = &k_sums;
    workspace_shape[0] = ropewalk_rope_backward_workspace(&args, &gradients);
    EXPECT_GT(workspace_shape[0], 0) << ropewalk_last_error();
    workspace = tensor(q, 1, workspace_shape, {kDLFloat, 32, 1});
    gradients.workspace = &workspace;
  }
};

TEST_F(LevelZeroHost, AGradientIsTwoLaunchesWithABarrierBetween) {
  InFreshProcess(kFake, [] {
    GradientCall call;
    ASSERT_EQ(ropewalk_rope_backward(&call.args, &call.gradients, nullptr), ROPEWALK_OK) << LastError();
    ASSERT_EQ(Fake().launches().size(), 2u);
    const FakeZeLaunch rows = Fake().launches()[0], sums = Fake().launches()[1];
    EXPECT_EQ(rows.function, "rope_backward_kernel");
    EXPECT_EQ(sums.function, "rope_sums_kernel");
    EXPECT_EQ(rows.barriers, 0);
    EXPECT_EQ(sums.barriers, 1);
    RopeBackwardCall lowered;
    ASSERT_TRUE(LowerRopeBackward(call.args, call.gradients, nullptr, &lowered).ok());
    RopeSpirvBackwardPlan plan;
    ASSERT_TRUE(PlanRopeSpirvBackward(lowered, GetLevelZeroDriver().devices[0].properties, &plan).ok());
    EXPECT_EQ(plan.workspace, call.workspace_shape[0]);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(rows.groups[i], plan.rows.groups[i]);
      EXPECT_EQ(sums.groups[i], plan.sums.groups[i]);
    }
    EXPECT_EQ(rows.group_size[0], plan.rows.local);
    EXPECT_EQ(sums.group_size[0], plan.sums.local);
    EXPECT_EQ(rows.constants[kRopeSpecSums], 1u);
    EXPECT_EQ(sums.constants.size(), 0u);
    ASSERT_EQ(rows.arguments.size(), size_t{kRopeBackwardPointers} + 1);
    const std::pair<int, const DLTensor*> pointers[] = {
        {0, &call.q_grad},  {1, &call.k_grad},         {2, &call.positions},      {7, &call.weight},
        {8, &call.weight},  {9, &call.q_grad},  // in place
        {10, &call.k_grad}, {kRopeBackwardQ, &call.q}, {kRopeBackwardK, &call.k}, {kRopeBackwardSums, &call.workspace}};
    for (const auto& [index, tensor] : pointers) {
      EXPECT_EQ(PointerOf(rows.arguments[static_cast<size_t>(index)]), tensor->data) << index;
    }
    EXPECT_NE(PointerOf(rows.arguments[kRopeBackwardTurns]), nullptr);
    EXPECT_NE(PointerOf(rows.arguments[kRopeBackwardFault]), nullptr);
    rope_backward_params params;
    ASSERT_EQ(rows.arguments[kRopeBackwardPointers].size(), sizeof(params));
    std::memcpy(&params, rows.arguments[kRopeBackwardPointers].data(), sizeof(params));
    EXPECT_EQ(params.q.token, 4 * 128);
    EXPECT_EQ(params.k.head, 128);
    EXPECT_EQ(params.q_groups, plan.q_groups);
    EXPECT_EQ(params.shape.sine_flip, 0x80000000u);  // turned back
    EXPECT_EQ(PointerOf(sums.arguments[0]), call.workspace.data);
    EXPECT_EQ(PointerOf(sums.arguments[1]), call.q_sums.data);
    EXPECT_EQ(PointerOf(sums.arguments[2]), call.k_sums.data);
    EXPECT_EQ(sums.arguments[kRopeSumsPointers].size(), sizeof(rope_sums_params));
    // Without sums there is one launch, and nothing waits for it.
    call.gradients.q_weight_grad = call.gradients.k_weight_grad = nullptr;
    EXPECT_EQ(ropewalk_rope_backward_workspace(&call.args, &call.gradients), 0);
    ASSERT_EQ(ropewalk_rope_backward(&call.args, &call.gradients, nullptr), ROPEWALK_OK) << LastError();
    ASSERT_EQ(Fake().launches().size(), 3u);
    EXPECT_EQ(Fake().launches()[2].barriers, 1);
    EXPECT_EQ(Fake().launches()[2].constants[kRopeSpecSums], 0u);
  });
}

// By the caller's names, and nothing is launched.
TEST_F(LevelZeroHost, TensorsOfAGradientMustBeMemoryOfTheContext) {
  InFreshProcess(kFake, [] {
    GradientCall call;
    static float elsewhere[1 << 16];
    const std::pair<const char*, DLTensor*> tensors[] = {{"q_grad", &call.q_grad},
                                                         {"k_grad", &call.k_grad},
                                                         {"q", &call.q},
                                                         {"k", &call.k},
                                                         {"q_weight", &call.weight},
                                                         {"q_weight_grad", &call.q_sums},
                                                         {"k_weight_grad", &call.k_sums},
                                                         {"workspace", &call.workspace},
                                                         {"positions", &call.positions}};
    for (const auto& [name, tensor] : tensors) {
      void* const data = std::exchange(tensor->data, elsewhere);
      EXPECT_EQ(ropewalk_rope_backward(&call.args, &call.gradients, nullptr), ROPEWALK_INVALID_ARGUMENT) << name;
      EXPECT_HAS(LastError(), Text("rope: ", name, " is said to be on xpu:0, but its data is no memory of"));
      tensor->data = data;
    }
    EXPECT_EQ(Fake().launches().size(), 0u);
  });
}
TEST_F(LevelZeroHost, ABarrierThatIsRefusedIsTold) {
  InFreshProcess(With(kFake, {{"FAKE_ZE_REFUSE", "zeCommandListAppendBarrier"}}), [] {
    GradientCall call;
    EXPECT_EQ(ropewalk_rope_backward(&call.args, &call.gradients, nullptr), ROPEWALK_DRIVER_ERROR);
    EXPECT_HAS(LastError(), "rope: zeCommandListAppendBarrier failed");
  });
}

TEST_F(LevelZeroHost, OneBuildServesAllLaterCalls) {
  InFreshProcess(kFake, [] {
    Call call;
    ASSERT_EQ(ropewalk_prepare(&call.args), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().launches().size(), 0u);
    const int modules = Fake().modules(), allocations = Fake().allocations();
    EXPECT_EQ(modules, 1);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&call] {
        for (int j = 0; j < 50; ++j) EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(Fake().modules(), modules);
    EXPECT_EQ(Fake().allocations(), allocations);
    ASSERT_EQ(Fake().launches().size(), 200u);
    for (const FakeZeLaunch& launch : Fake().launches()) EXPECT_EQ(PointerOf(launch.arguments[0]), call.q.data);
    // Equal frequencies share one copy on the device.
    Call again;
    ASSERT_EQ(ropewalk_rope(&again.args, nullptr), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().launches().back().arguments[kRopeSpirvTurns], Fake().launches()[0].arguments[kRopeSpirvTurns]);
    Call other(nullptr, 0, 4, 500000.0);
    ASSERT_EQ(ropewalk_rope(&other.args, nullptr), ROPEWALK_OK) << LastError();
    EXPECT_NE(Fake().launches().back().arguments[kRopeSpirvTurns], Fake().launches()[0].arguments[kRopeSpirvTurns]);
    EXPECT_EQ(Fake().modules(), modules);
  });
}

TEST_F(LevelZeroHost, ThreadsThatBuildTogetherBuildOnce) {
  InFreshProcess(kFake, [] {
    Call first, second(nullptr, 0, 7);
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&, i] {
        Call& call = i % 2 ? first : second;
        for (int j = 0; j < 20; ++j) EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(Fake().modules(), 1);
    // No launch took the arguments of another: the tokens go with the tensors.
    for (const FakeZeLaunch& launch : Fake().launches()) {
      const bool is_first = PointerOf(launch.arguments[0]) == first.q.data;
      EXPECT_EQ(launch.groups[0], is_first ? 4u : 7u);
    }
  });
}

TEST_F(LevelZeroHost, TheCallersListAndItsContext) {
  InFreshProcess(kFake, [] {
    (void)IntelBackend();
    void* context = Fake().new_context();
    void* list = Fake().new_list(context, 0);
    Call call(context);
    ASSERT_EQ(ropewalk_rope(&call.args, list), ROPEWALK_OK) << LastError();
    ASSERT_EQ(Fake().launches().size(), 1u);
    EXPECT_EQ(Fake().launches()[0].list, list);
    EXPECT_EQ(Fake().launches()[0].context, context);
    // Another context: other modules. Our own for calls without a list, where that memory is unknown.
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_HAS(LastError(), "rope: q is said to be on xpu:0, but its data is no memory of Level Zero's context");
    Call own;
    ASSERT_EQ(ropewalk_rope(&own.args, nullptr), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().modules(), 2);
  });
}

TEST_F(LevelZeroHost, FaultsAreTold) {
  InFreshProcess(kFake, [] {
    Call call;
    ASSERT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << LastError();
    ASSERT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    ASSERT_EQ(ropewalk_check_faults(), ROPEWALK_OK) << LastError();
    ASSERT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    auto* fault = static_cast<rope_fault*>(PointerOf(Fake().launches().back().arguments[kRopeSpirvFault]));
    ASSERT_NE(fault, nullptr);
    EXPECT_EQ(fault->key, ~rw_u64{0});
    *fault = {2 * 4 + kRopeFaultPosition, 77, 50, 4, 0, 0};
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_FAULT);
    EXPECT_EQ(LastError(), "rope: positions[2] is 77, but the table has 50 rows; the token was filled with NaN");
    EXPECT_EQ(ropewalk_check_faults(), ROPEWALK_OK);
    EXPECT_EQ(fault->key, ~rw_u64{0});
  });
}

TEST_F(LevelZeroHost, NoTokensAreNoWork) {
  InFreshProcess(kFake, [] {
    Call call(nullptr, 0, 0);
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    EXPECT_EQ(ropewalk_prepare(&call.args), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().launches().size(), 0u);
    const char* text = ropewalk_explain(&call.args);
    ASSERT_NE(text, nullptr) << LastError();
    EXPECT_HAS(text, "there is no work");
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals; the process lives on

TEST_F(LevelZeroHost, RefusesOtherDevices) {
  InFreshProcess(With(kFake, {{"FAKE_ZE_DEVICES", "2"}}), [] {
    (void)IntelBackend();
    void* context = Fake().new_context();
    Call call(context, 0);
    EXPECT_EQ(ropewalk_rope(&call.args, Fake().new_list(context, 1)), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_EQ(LastError(), "rope: q is on xpu:0, but the stream is a command list of xpu:1");
    call.k.data = Fake().allocate(context, 1, 4096);
    EXPECT_EQ(ropewalk_rope(&call.args, Fake().new_list(context, 0)), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_EQ(LastError(), "rope: k is said to be on xpu:0, but its data is on another device");
    call.k.data = Fake().allocate(context, -1, 4096);  // shared memory serves
    EXPECT_EQ(ropewalk_rope(&call.args, Fake().new_list(context, 0)), ROPEWALK_OK) << LastError();
    call.q.device.device_id = call.k.device.device_id = call.positions.device.device_id = 5;
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_EQ(LastError(), "rope: q is on xpu:5, but Level Zero has 2 GPUs here");
    EXPECT_EQ(Fake().launches().size(), 1u);
  });
}

TEST_F(LevelZeroHost, RefusesHostMemory) {
  InFreshProcess(kFake, [] {
    Call call;
    std::vector<uint16_t> host(4 * 4 * 128 + 64);
    call.q.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(host.data()) + 63) / 64 * 64);
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_INVALID_ARGUMENT);
    EXPECT_HAS(LastError(), "rope: q is said to be on xpu:0, but its data is no memory of Level Zero's context");
    EXPECT_HAS(LastError(), "sycl_queue");
  });
}

// Told by doctor with what would help, by a call, and the CPU still serves.
TEST_F(LevelZeroHost, DevicesThatDoNotFit) {
  const std::tuple<const char*, const char*, const char*> lacks[] = {
      {"FAKE_ZE_SUB_GROUPS", "32 64", "has sub-groups of 32, 64, but 16 is needed"},
      {"FAKE_ZE_LACKS", "float16", "has no 16-bit floats, which are needed"},
      {"FAKE_ZE_LACKS", "spirv", "takes SPIR-V 1.1, but 1.2 is needed"},
  };
  for (const auto& [variable, value, why] : lacks) {
    InFreshProcess(With(kFake, {{variable, value}}), [why = why] {
      const nlohmann::json backend = IntelBackend();
      EXPECT_FALSE(backend.at("available").get<bool>());
      EXPECT_HAS(backend.at("detail").get<std::string>(), why);
      EXPECT_HAS(backend.at("remedy").get<std::string>(), "use a GPU that fits, or a newer driver");
      Call call;
      EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_UNAVAILABLE);
      EXPECT_EQ(LastError(), Text("rope: q is on xpu:0 (Fake GPU), which ", why, "; move the tensors to the CPU"));
      for (DLTensor* tensor : {&call.q, &call.k, &call.positions}) tensor->device = {kDLCPU, 0};  // memory of the host
      EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    });
  }
}

TEST_F(LevelZeroHost, ADriverThatRefusesTheKernelIsQuoted) {
  InFreshProcess(With(kFake, {{"FAKE_ZE_REFUSE", "zeModuleCreate"}}), [] {
    Call call;
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_DRIVER_ERROR);
    EXPECT_HAS(LastError(),
               "rope: zeModuleCreate failed: ZE_RESULT_ERROR_MODULE_BUILD_FAILURE (0x70000004) for bfloat16");
    EXPECT_HAS(LastError(), "error: this device has no such instruction");
    setenv("FAKE_ZE_REFUSE", "", 1);
    EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
  });
}

TEST_F(LevelZeroHost, OtherFailuresOfTheDriver) {
  for (const char* function : {"zeKernelCreate", "zeMemAllocDevice", "zeCommandListAppendLaunchKernel"}) {
    InFreshProcess(With(kFake, {{"FAKE_ZE_REFUSE", function}}), [&] {
      Call call;
      EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_DRIVER_ERROR);
      EXPECT_HAS(LastError(), Text("rope: ", function, " failed: ZE_RESULT_ERROR_"));
      setenv("FAKE_ZE_REFUSE", "", 1);
      EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    });
  }
}

TEST_F(LevelZeroHost, WithoutALoader) {
  InFreshProcess({{"ROPEWALK_LIBZE_LOADER", "/nowhere/libze_loader.so.1"}}, [] {
    const nlohmann::json backend = IntelBackend();
    EXPECT_FALSE(backend.at("available").get<bool>());
    EXPECT_HAS(backend.at("detail").get<std::string>(), "ROPEWALK_LIBZE_LOADER names /nowhere/libze_loader.so.1");
    EXPECT_HAS(backend.at("remedy").get<std::string>(), "libze1");
    std::vector<float> data(64);
    int64_t shape[3] = {1, 1, 64};
    DLTensor q = {data.data(), {static_cast<DLDeviceType>(kDlOneApi), 0}, 3, {kDLFloat, 32, 1}, shape, nullptr, 0};
    ropewalk_rope_args args;
    args.q = &q;
    ASSERT_EQ(ropewalk_frequencies_create(1e4, 64, nullptr, 0, const_cast<ropewalk_frequencies**>(&args.frequencies)),
              ROPEWALK_OK);
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_UNAVAILABLE);
    EXPECT_HAS(LastError(), "rope: q is on xpu:0, but Level Zero is not available: ROPEWALK_LIBZE_LOADER names");
    EXPECT_EQ(ropewalk_force_backend("intel"), ROPEWALK_UNAVAILABLE);
    q.device = {kDLCPU, 0};  // the process lives on
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << LastError();
  });
  InFreshProcess(With(kFake, {{"FAKE_ZE_REFUSE", "zeInit"}}), [] {
    const nlohmann::json backend = IntelBackend();
    EXPECT_FALSE(backend.at("available").get<bool>());
    EXPECT_HAS(backend.at("detail").get<std::string>(), "zeInit failed: ZE_RESULT_ERROR_UNINITIALIZED (0x78000001)");
    EXPECT_HAS(backend.at("remedy").get<std::string>(), "/dev/dri");
  });
  InFreshProcess(With(kFake, {{"FAKE_ZE_DEVICES", "0"}}),
                 [] { EXPECT_HAS(IntelBackend().at("detail").get<std::string>(), "sees no GPU"); });
}

// ---------------------------------------------------------------------------------------------------------------------
// SYCL queues of Level Zero, which is what torch's are, and what else a queue may be: on a stand-in for the shim

FakeSycl& Sycl() {
  static FakeSycl& fake = FakeOf<FakeSycl>(ROPEWALK_FAKE_SYCL_SHIM, "fake_sycl");
  return fake;
}

const Environment kFakeQueue = With(kFake, {{"ROPEWALK_LIBSYCL_SHIM", ROPEWALK_FAKE_SYCL_SHIM}});

FakeSyclQueue QueueOf(SyclBackend backend, const char* name, void* context, void* device) {
  FakeSyclQueue queue = {{backend, 1, context, device, {}, "Fake GPU"}};
  std::snprintf(queue.info.backend_name, sizeof(queue.info.backend_name), "%s", name);
  return queue;
}

TEST_F(LevelZeroHost, ASyclQueueOfLevelZero) {
  InFreshProcess(kFakeQueue, [] {
    (void)IntelBackend();
    void* context = Fake().new_context();
    FakeSyclQueue queue = QueueOf(kSyclLevelZero, "Level Zero", context, GetLevelZeroDriver().devices[0].handle);
    Call call(context);
    call.args.sycl_queue = &queue;
    ASSERT_EQ(ropewalk_prepare(&call.args), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().modules(), 1);
    EXPECT_EQ(Sycl().wrapped, 1);
    EXPECT_EQ(Sycl().launches.size(), 0u);
    for (int i = 0; i < 3; ++i) ASSERT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_OK) << LastError();
    EXPECT_EQ(Fake().modules(), 1);
    EXPECT_EQ(Sycl().wrapped, 1);
    EXPECT_EQ(Fake().launches().size(), 0u);  // SYCL launches, not we
    ASSERT_EQ(Sycl().launches.size(), 3u);
    const FakeSyclLaunch& launch = Sycl().launches[0];
    EXPECT_EQ(launch.queue, &queue);
    EXPECT_NE(launch.kernel, nullptr);
    RopeCall lowered;
    ASSERT_TRUE(LowerRope(call.args, nullptr, &lowered).ok());
    RopeSpirvPlan plan;
    ASSERT_TRUE(PlanRopeSpirv(lowered, GetLevelZeroDriver().devices[0].properties, &plan).ok());
    for (int i = 0; i < 3; ++i) EXPECT_EQ(launch.groups[i], plan.groups[i]);
    EXPECT_EQ(launch.local, plan.local);
    ASSERT_EQ(launch.arguments.size(), size_t{kRopeSpirvArguments});
    EXPECT_EQ(PointerOf(launch.arguments[0]), call.q.data);
    EXPECT_EQ(PointerOf(launch.arguments[1]), call.k.data);
    const auto* turns = static_cast<const uint64_t*>(PointerOf(launch.arguments[kRopeSpirvTurns]));
    EXPECT_EQ(std::memcmp(turns, call.frequencies->turns.data(), 64 * sizeof(uint64_t)), 0);
    EXPECT_EQ(launch.arguments[kRopeSpirvPointers].size(), sizeof(rope_spirv_params));
    const char* text = ropewalk_explain(&call.args);
    ASSERT_NE(text, nullptr) << LastError();
    const nlohmann::json explanation = nlohmann::json::parse(text);
    EXPECT_EQ(explanation.at("device"), "Fake GPU, Level Zero");
    EXPECT_EQ(explanation.at("queue"), "SYCL (libsycl.so.fake)");
    // The specialisation constants of the module, as a launch of the same call through Level Zero itself shows them.
    const void* kernel = launch.kernel;
    ASSERT_NE(kernel, nullptr);
    call.args.sycl_queue = nullptr;
    ASSERT_EQ(ropewalk_rope(&call.args, Fake().new_list(context, 0)), ROPEWALK_OK) << LastError();
    for (size_t i = 0; i < kRopeSpecCount; ++i) EXPECT_EQ(Fake().launches()[0].constants[i], plan.key.constants[i]);
  });
}

TEST_F(LevelZeroHost, AGradientOnASyclQueueOfLevelZero) {
  InFreshProcess(kFakeQueue, [] {
    (void)IntelBackend();
    void* context = Fake().new_context();
    FakeSyclQueue queue = QueueOf(kSyclLevelZero, "Level Zero", context, GetLevelZeroDriver().devices[0].handle);
    GradientCall call(context, &queue);
    for (int i = 0; i < 2; ++i) {
      ASSERT_EQ(ropewalk_rope_backward(&call.args, &call.gradients, nullptr), ROPEWALK_OK) << LastError();
    }
    EXPECT_EQ(Fake().modules(), 2);
    EXPECT_EQ(Sycl().wrapped, 2);
    ASSERT_EQ(Sycl().launches.size(), 4u);
    const FakeSyclLaunch &rows = Sycl().launches[2], &sums = Sycl().launches[3];
    ASSERT_EQ(rows.arguments.size(), size_t{kRopeBackwardPointers} + 1);
    EXPECT_EQ(PointerOf(rows.arguments[kRopeBackwardSums]), call.workspace.data);
    EXPECT_EQ(rows.arguments[kRopeBackwardPointers].size(), sizeof(rope_backward_params));
    ASSERT_EQ(sums.arguments.size(), size_t{kRopeSumsPointers} + 1);
    EXPECT_EQ(PointerOf(sums.arguments[1]), call.q_sums.data);
    EXPECT_EQ(sums.arguments[kRopeSumsPointers].size(), sizeof(rope_sums_params));
  });
}

// What is refused of a queue: what is told, and that the process lives on.
void ExpectQueueRefused(const Environment& environment, const std::function<void(FakeSyclQueue*)>& change,
                        ropewalk_code code, const char* words) {
  InFreshProcess(environment, [&] {
    const bool driver = GetLevelZeroDriver().status.ok();
    FakeSyclQueue queue = QueueOf(kSyclLevelZero, "Level Zero", driver ? Fake().new_context() : nullptr,
                                  driver ? GetLevelZeroDriver().devices[0].handle : nullptr);
    change(&queue);
    std::vector<float> data(64, 1.0f);
    int64_t shape[3] = {1, 1, 64};
    DLTensor q = {data.data(), {static_cast<DLDeviceType>(kDlOneApi), 0}, 3, {kDLFloat, 32, 1}, shape, nullptr, 0};
    ropewalk_frequencies* frequencies = nullptr;
    ASSERT_EQ(ropewalk_frequencies_create(1e4, 64, nullptr, 0, &frequencies), ROPEWALK_OK);
    ropewalk_rope_args args;
    args.q = &q;
    args.frequencies = frequencies;
    args.sycl_queue = &queue;
    EXPECT_EQ(ropewalk_rope(&args, nullptr), code) << LastError();
    EXPECT_HAS(LastError(), words);
    EXPECT_EQ(Sycl().launches.size(), 0u);
    q.device = {kDLCPU, 0};
    args.sycl_queue = nullptr;
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << LastError();
  });
}

TEST_F(LevelZeroHost, RefusedQueues) {
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { *queue = QueueOf(kSyclOther, "CUDA", nullptr, nullptr); },
      ROPEWALK_INVALID_ARGUMENT, "rope: sycl_queue must be of Level Zero or OpenCL, but is of CUDA (Fake GPU)");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->memory = kSyclOtherDevice; }, ROPEWALK_INVALID_ARGUMENT,
      "rope: q must be on the device of sycl_queue (Fake GPU, Level Zero), but its data is on another");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->memory = kSyclUnknown; }, ROPEWALK_INVALID_ARGUMENT,
      "rope: q must be unified shared memory of the context of sycl_queue (Fake GPU, Level Zero)");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->refuses = "find"; }, ROPEWALK_DRIVER_ERROR,
      "rope: sycl_queue cannot be used: the test wants find to fail");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->refuses = "wrap"; }, ROPEWALK_DRIVER_ERROR,
      "rope: taking over a kernel failed on the SYCL queue of Fake GPU, Level Zero: the test wants");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->refuses = "launch"; }, ROPEWALK_DRIVER_ERROR,
      "rope: the launch failed on the SYCL queue of Fake GPU, Level Zero: the test wants launch to fail");
  ExpectQueueRefused(
      kFakeQueue, [](FakeSyclQueue* queue) { queue->refuses = "allocate"; }, ROPEWALK_DRIVER_ERROR,
      "rope: an allocation failed on the SYCL queue of Fake GPU, Level Zero");
}

TEST_F(LevelZeroHost, QueuesOfDevicesAndDriversThatDoNotFit) {
  const auto as_it_is = [](FakeSyclQueue*) {};
  ExpectQueueRefused(With(kFakeQueue, {{"FAKE_ZE_SUB_GROUPS", "32"}}), as_it_is, ROPEWALK_UNAVAILABLE,
                     "rope: sycl_queue is on Fake GPU, which has sub-groups of 32, but 16 is needed; move the tensors");
  ExpectQueueRefused(With(kFakeQueue, {{"FAKE_ZE_LACKS", "float16"}}), as_it_is, ROPEWALK_UNAVAILABLE,
                     "rope: sycl_queue is on Fake GPU, which has no 16-bit floats, which are needed; move the tensors");
  ExpectQueueRefused(With(kFakeQueue, {{"FAKE_ZE_REFUSE", "zeModuleCreate"}}), as_it_is, ROPEWALK_DRIVER_ERROR,
                     "error: this device has no such instruction");  // the driver's log
  ExpectQueueRefused(With(kFakeQueue, {{"ROPEWALK_LIBZE_LOADER", "/nowhere/libze_loader.so.1"}}), as_it_is,
                     ROPEWALK_UNAVAILABLE,
                     "rope: sycl_queue is of Level Zero, but Level Zero is not available: ROPEWALK_LIBZE_LOADER names");
}

// A queue does not say which libsycl made it.
TEST_F(LevelZeroHost, AQueueWhereNoneOrBothRunTimesAreLoaded) {
  for (const bool both : {false, true}) {
    InFreshProcess(kFake, [both] {
      (void)IntelBackend();
      for (const char* library : {ROPEWALK_FAKE_LIBSYCL9, ROPEWALK_FAKE_LIBSYCL8}) {
        if (both) {
          ASSERT_NE(dlopen(library, RTLD_NOW), nullptr) << dlerror();
        }
      }
      void* context = Fake().new_context();
      FakeSyclQueue queue = QueueOf(kSyclLevelZero, "Level Zero", context, GetLevelZeroDriver().devices[0].handle);
      Call call(context);
      call.args.sycl_queue = &queue;
      EXPECT_EQ(ropewalk_rope(&call.args, nullptr), ROPEWALK_UNAVAILABLE);
      EXPECT_HAS(LastError(),
                 both ? "rope: sycl_queue is given, but libsycl.so.9 and libsycl.so.8 are both loaded, and a "
                        "queue does not say whose it is; set ROPEWALK_LIBSYCL_SHIM to the "
                      : "rope: sycl_queue is given, but neither libsycl.so.9 nor libsycl.so.8 is loaded");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// doctor

// The row of the backend in one line, single spaces between words.
std::string DoctorOf(const std::string& environment) {
  // Under AddressSanitizer: the OpenCL drivers that it looks at leave memory behind when they are closed again.
  const std::string no_leaks = "ASAN_OPTIONS=\"$ASAN_OPTIONS:detect_leaks=0\" ";
  FILE* pipe = popen(Text(no_leaks, environment, " '", ROPEWALK_COMMAND, "' doctor 2>&1").c_str(), "r");
  std::string all, line;
  for (int c; pipe && (c = fgetc(pipe)) != EOF;) {
    if (c != ' ' || (!all.empty() && all.back() != ' ')) all += static_cast<char>(c);
  }
  EXPECT_EQ(pipe ? pclose(pipe) : -1, 0) << all;
  for (size_t at = 0; (at = all.find("\n ", at)) != std::string::npos;) all.erase(at, 1);  // lines that go on
  const size_t begin = all.find("\nintel ");
  return begin == std::string::npos ? all : all.substr(begin + 1, all.find('\n', begin + 1) - begin - 1);
}

TEST_F(LevelZeroHost, DoctorNamesWhatIsMissingAndTheRemedy) {
  if (std::string(ROPEWALK_COMMAND).empty()) GTEST_SKIP() << "the command line is not built for this machine";
  const std::string fake = Text("ROPEWALK_LIBZE_LOADER='", ROPEWALK_FAKE_LIBZE, "' ");
  const std::string served = DoctorOf(fake);
  EXPECT_HAS(served, "intel yes Level Zero 1.9; xpu:0 (Fake GPU)");
  const std::string no_loader = DoctorOf("ROPEWALK_LIBZE_LOADER=/nowhere/libze_loader.so.1");
  EXPECT_HAS(no_loader, "intel no ROPEWALK_LIBZE_LOADER names /nowhere/libze_loader.so.1, which cannot be opened");
  EXPECT_HAS(no_loader, "apt-get install libze1");
  const std::string no_shim = DoctorOf(fake + "ROPEWALK_LIBSYCL_SHIM=/nowhere/shim.so");
  EXPECT_HAS(no_shim,
             "no SYCL queues: ROPEWALK_LIBSYCL_SHIM is /nowhere/shim.so, which is not there remedy: unset ROPEWALK_");
  const std::string narrow = DoctorOf(fake + "FAKE_ZE_SUB_GROUPS=32");
  EXPECT_HAS(narrow, "intel no Level Zero 1.9; xpu:0 (Fake GPU) has sub-groups of 32, but 16 is needed");
  EXPECT_HAS(narrow, "use a GPU that fits, or a newer driver");
  EXPECT_HAS(DoctorOf(fake + "FAKE_ZE_LACKS=float16"), "xpu:0 (Fake GPU) has no 16-bit floats, which are needed");
  EXPECT_HAS(DoctorOf(fake + "FAKE_ZE_DEVICES=0"), "sees no GPU");
#ifdef ROPEWALK_HAS_SHIMS
  EXPECT_HAS(served, "SYCL queues of libsycl.so.");  // found from bin/ too
#endif
}

}  // namespace
}  // namespace ropewalk
