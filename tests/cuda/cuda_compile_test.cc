// Every pair of choices of the CUDA kernel compiles, with warnings as errors and without spills, for every architecture
// from sm_80 to sm_120a: with NVRTC, as at run time, and with nvcc. Where one of them is absent, its tests are skipped.
// ROPEWALK_CUDA_ALL=1 compiles every variant for every architecture.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cuda/bundle.h"
#include "backends/cuda/cache.h"
#include "backends/cuda/nvrtc.h"
#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "conformance/variants.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

// Of every variant that a GPU of this architecture has, its share of every pair of choices: the architectures together
// take all. sm_90a takes all that limit registers besides: limits are searched there.
std::vector<CudaVariant> VariantsFor(const std::string& arch, const CudaDevice& device) {
  std::vector<CudaVariant> variants;
  const Status status = CudaVariantsOf(RopeCases(), device, &variants);
  EXPECT_TRUE(status.ok()) << status.text();
  const char* all = getenv("ROPEWALK_CUDA_ALL");
  if (all && *all == '1') return variants;
  const std::vector<std::string> archs = BundleArchs();
  const auto share = static_cast<size_t>(std::ranges::find(archs, arch) - archs.begin());
  const std::vector<CudaVariant> covering = CoveringVariants(variants);
  std::vector<CudaVariant> out;
  for (size_t i = 0; i < covering.size(); ++i) {
    const bool limited = device.major == 9 && covering[i].key.min_blocks != 1;
    if (limited || i % archs.size() == share) out.push_back(covering[i]);
  }
  return out;
}

class CudaCompile : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaCompile, Nvrtc) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  std::vector<CudaDevice> devices;
  ASSERT_TRUE(BundleDevices(GetParam(), &devices).ok());
  std::string arch;
  if (const Status status = ChooseArch(*nvrtc, devices.front(), &arch); !status.ok()) GTEST_SKIP() << status.text();
  EXPECT_EQ(arch, GetParam());

  const std::vector<CudaVariant> variants = VariantsFor(GetParam(), devices.front());
  ASSERT_FALSE(variants.empty());
  std::atomic<size_t> compiled{0};
  std::mutex mutex;
  std::vector<std::string> failures;
  OnAllThreads(variants.size(), [&](const auto& next) {
    for (size_t i = next(); i < variants.size(); i = next()) {
      const RopeCudaKey& key = variants[i].key;
      Compilation compilation;
      const Status status = CompileCuda(*nvrtc, RopeCudaSource(key), arch, /*verbose=*/true, &compilation);
      const PtxasText said = ReadPtxas(compilation.log);
      std::string why = status.text();
      if (status.ok() && !said.warnings.empty()) why = said.warnings;
      if (status.ok() && said.spilled_bytes) why = Text("spills ", said.spilled_bytes, " bytes");
      if (status.ok() && said.registers == 0) why = Text("ptxas said nothing of registers:\n", compilation.log);
      if (status.ok() && why.empty()) ++compiled;
      const std::lock_guard lock(mutex);
      if (!why.empty()) failures.push_back(Text(RopeCudaName(key), " (case ", variants[i].of, "): ", why));
    }
  });
  EXPECT_EQ(compiled, variants.size());
  for (size_t i = 0; i < std::min<size_t>(failures.size(), 5); ++i) ADD_FAILURE() << failures[i];
}

PtxasText CompileFor(const Nvrtc& nvrtc, const RopeCudaKey& key, const std::string& arch) {
  Compilation compilation;
  const Status status = CompileRopeCuda(nvrtc, key, arch, /*verbose=*/true, &compilation);
  EXPECT_TRUE(status.ok()) << status.text();
  const PtxasText said = ReadPtxas(compilation.log);
  EXPECT_EQ(CubinStackBytes(compilation.cubin), said.stack_bytes) << RopeCudaName(key);
  EXPECT_EQ(CubinStackBytes(std::string_view(compilation.cubin).substr(0, compilation.cubin.size() / 2)), 0);
  return said;
}

// Norm, rope and store of 32/8 heads of 64, by shapes of a warp a block. In caches without pages the kernels take 68
// registers, and 28 of them fit a multiprocessor of an H200.
Status CrowdedPlan(int64_t tokens, int stages, bool k_store_only, const CudaDevice& device, RopeCudaPlan* plan) {
  RopeCase c;
  c.dtype = kBF16;
  c.tokens = tokens;
  c.q_heads = 32;
  c.k_heads = 8;
  c.head_dim = c.rotary_dim = 64;
  c.layout = Layout::kPacked;
  c.norm = true;
  c.weight = Weight::kPlain;
  c.weight_dtype = c.cache_dtype = kBF16;
  c.cache = Cache::kFlat;
  c.v_dim = 64;
  c.k_store_only = k_store_only;
  std::unique_ptr<CaseCall> made;
  ROPEWALK_TRY(CaseCall::Make(c, HostMemory(), &made));
  RopeCall call;
  ROPEWALK_TRY(LowerRope(made->args(), nullptr, &call));
  const auto shape = RopeCudaShape::Of({0, 0, static_cast<uint8_t>(stages), 1, 6, 1, 1, 0, 1, 3});
  ROPEWALK_TRY(PlanRopeCuda(call, device, {.dependent_launch = true, .shape = &shape}, plan));
  return CheckRopeCudaPlan(call, device, *plan);
}

// A few registers above 64 cost a second round of blocks, and a limit avoids that without a spill.
TEST(CudaCompileAgain, AFewRegistersTooMany) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  int crowded = 0;
  for (const int stages : {4, 5}) {
    for (const bool k_store_only : {false, true}) {
      RopeCudaPlan plan;
      const Status planned = CrowdedPlan(4096, stages, k_store_only, {132, 9, 0}, &plan);
      ASSERT_TRUE(planned.ok()) << planned.text();
      ASSERT_EQ(plan.at_once, 32);
      ASSERT_EQ(plan.crowded_from, 65);
      ASSERT_EQ(plan.crowded_to, 80);
      const PtxasText free = CompileFor(*nvrtc, plan.key, "sm_90a"),
                      once = CompileFor(*nvrtc, AtOnceKey(plan), "sm_90a");
      EXPECT_GT(once.registers, 0);
      EXPECT_LT(once.registers, plan.crowded_from);
      EXPECT_EQ(once.spilled_bytes, 0);
      crowded += free.registers >= plan.crowded_from && free.registers <= plan.crowded_to;
    }
  }
  EXPECT_GT(crowded, 0) << "no variant takes more than 64 registers: the test needs other ones";
}

// As NVIDIA's cuda_occupancy.h has it for compute capability 9.0: threads of a block, registers of a thread, blocks.
TEST(CudaCompileAgain, BlocksOfAMultiprocessor) {
  constexpr int kBlocks[][3] = {{32, 40, 32}, {32, 64, 32},  {32, 65, 28},  {32, 72, 28},  {32, 80, 24},  {32, 88, 20},
                                {32, 96, 20}, {32, 104, 16}, {32, 128, 16}, {32, 136, 12}, {32, 168, 12}, {64, 64, 16},
                                {64, 72, 14}, {64, 80, 12},  {64, 88, 10},  {96, 64, 10},  {96, 72, 9},   {96, 80, 8},
                                {96, 88, 6},  {128, 64, 8},  {128, 72, 7},  {128, 96, 5},  {160, 64, 6},  {160, 72, 5},
                                {160, 80, 4}, {192, 64, 5},  {192, 72, 4},  {192, 88, 3},  {256, 64, 4},  {256, 72, 3}};
  RopeCudaPlan plan;
  ASSERT_TRUE(CrowdedPlan(4096, 4, false, {132, 9, 0}, &plan).ok());
  plan.key.flat = 0;
  plan.key.in_flight = 1;  // little shared memory
  for (const auto& [threads, registers, blocks] : kBlocks) {
    plan.key.threads = static_cast<uint16_t>(threads);
    EXPECT_EQ(ResidentBlocks(plan.key, {132, 9, 0}, registers), blocks) << threads << " threads, " << registers;
  }
}

// Which grids a limit brings into one round. A few blocks more than a round do not count.
TEST(CudaCompileAgain, WhereTheGridFits) {
  using Facts = std::array<int, 3>;
  const auto facts = [](int64_t tokens, const CudaDevice& device) {
    RopeCudaPlan plan;
    const Status status = CrowdedPlan(tokens, 4, false, device, &plan);
    EXPECT_TRUE(status.ok()) << status.text();
    EXPECT_EQ(plan.grid_x, tokens);
    return Facts{plan.at_once, plan.crowded_from, plan.crowded_to};
  };
  const Facts none = {0, 0, 0};
  for (const int sm_count : {132, 78}) {
    const CudaDevice device = {sm_count, 9, 0};
    EXPECT_EQ(facts(32 * sm_count + 1, device), none);
    EXPECT_EQ(facts(32 * sm_count, device), (Facts{32, 65, 80}));
    EXPECT_EQ(facts(28 * sm_count * 104 / 100, device), (Facts{32, 65, 80}));
    EXPECT_EQ(facts(28 * sm_count * 103 / 100, device), (Facts{32, 73, 80}));
    EXPECT_EQ(facts(28 * sm_count, device), (Facts{28, 73, 90}));
    EXPECT_EQ(facts(24 * sm_count, device), (Facts{24, 81, 100}));
    EXPECT_EQ(facts(20 * sm_count, device), (Facts{20, 97, 120}));
    EXPECT_EQ(facts(16 * sm_count, device), (Facts{16, 129, 160}));
    EXPECT_EQ(facts(8 * sm_count, device), none);              // by 255 registers
    EXPECT_EQ(facts(32 * sm_count, {sm_count, 10, 0}), none);  // nothing is searched there
  }
}

// A limit that makes a variant spill is given up, on every architecture, but for one that lets the grid run at once:
// there a few bytes are worth it, and who loads it looks at them.
TEST(CudaCompileAgain, ALimitThatSpills) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  for (const char* arch : {"sm_80", "sm_90a"}) {
    RopeCudaPlan plan;
    ASSERT_TRUE(CrowdedPlan(4096, 4, false, {132, 9, 0}, &plan).ok());
    plan.key.threads = 64;
    plan.key.min_blocks = 32;  // 32 registers a thread
    Compilation compilation;
    ASSERT_TRUE(CompileCuda(*nvrtc, RopeCudaSource(plan.key), arch, /*verbose=*/true, &compilation).ok());
    ASSERT_GT(ReadPtxas(compilation.log).spilled_bytes, 16) << arch;
    EXPECT_EQ(CompileFor(*nvrtc, plan.key, arch).spilled_bytes, 0) << arch;
    plan.key.at_once = 1;
    EXPECT_GT(CompileFor(*nvrtc, plan.key, arch).spilled_bytes, 16) << arch;
  }
}

// The kernels of the gradient: common heads, and every so many of the cases. Heads up to 256 spill nothing.
TEST_P(CudaCompile, Gradients) {
  const Nvrtc* nvrtc = nullptr;
  if (const Status status = OpenNvrtc(&nvrtc); !status.ok()) GTEST_SKIP() << status.text();
  std::vector<CudaDevice> devices;
  ASSERT_TRUE(BundleDevices(GetParam(), &devices).ok());
  std::string arch;
  if (const Status status = ChooseArch(*nvrtc, devices.front(), &arch); !status.ok()) GTEST_SKIP() << status.text();
  std::vector<RopeCase> cases = BackwardCases(151);
  for (const int64_t head_dim : {64, 80, 96, 128, 256}) {
    for (const uint32_t dtype : {uint32_t{kBF16}, uint32_t{kF32}}) {
      RopeCase c;
      c.dtype = c.weight_dtype = dtype;
      c.head_dim = head_dim;
      c.pairing = head_dim == 96 ? ROPEWALK_INTERLEAVED : ROPEWALK_NEOX;
      c.norm = true;
      c.weight = Weight::kPlain;
      c.name = CaseName(c);
      cases.push_back(c);
    }
  }
  std::map<std::string, RopeCudaKey> kernels;  // by their text
  for (const RopeCase& c : cases) {
    std::unique_ptr<CaseCall> made;
    ASSERT_TRUE(CaseCall::MakeBackward(c, HostMemory(), &made).ok()) << c.name;
    RopeBackwardCall call;
    const Status lowered = LowerRopeBackward(made->args(), made->gradients(), nullptr, &call);
    ASSERT_TRUE(lowered.ok()) << lowered.text();
    if (!call.turn.variant.norm) continue;
    RopeCudaBackwardPlan plan;
    ASSERT_TRUE(PlanRopeCudaBackward(call, devices.front(), &plan).ok());
    kernels[RopeCudaSource(plan.key)] = plan.key;
    if (plan.sums_blocks) kernels[RopeCudaSource(plan.sums_key)] = plan.sums_key;
  }
  ASSERT_GE(kernels.size(), 10u);
  const std::vector<std::pair<std::string, RopeCudaKey>> all(kernels.begin(), kernels.end());
  std::mutex mutex;
  OnAllThreads(all.size(), [&](const auto& next) {
    for (size_t i = next(); i < all.size(); i = next()) {
      const RopeCudaKey& key = all[i].second;
      Compilation compilation;
      const Status status = CompileCuda(*nvrtc, all[i].first, arch, /*verbose=*/true, &compilation);
      const PtxasText said = ReadPtxas(compilation.log);
      const std::lock_guard lock(mutex);
      EXPECT_TRUE(status.ok()) << RopeCudaName(key) << ": " << status.text();
      EXPECT_EQ(said.warnings, "") << RopeCudaName(key);
      if (key.head_dim <= 256) {
        EXPECT_EQ(said.spilled_bytes, 0) << RopeCudaName(key) << ", " << said.registers << " registers";
      }
    }
  });
}

TEST_P(CudaCompile, Nvcc) {
  const std::string path = fs::exists("/usr/local/cuda/bin/nvcc") ? "/usr/local/cuda/bin/nvcc" : "nvcc";
  if (std::system(Text(path, " --version > /dev/null 2>&1").c_str()) != 0) GTEST_SKIP() << "there is no nvcc here";
  std::string name = (fs::temp_directory_path() / "ropewalk-nvcc-XXXXXX").string();
  ASSERT_NE(mkdtemp(name.data()), nullptr);
  const fs::path directory = name;
  for (size_t i = 0; i < kCudaSourceCount; ++i) {
    fs::create_directories((directory / kCudaSources[i].path).parent_path());
    std::ofstream(directory / kCudaSources[i].path) << kCudaSources[i].text;
  }
  std::vector<CudaDevice> devices;
  ASSERT_TRUE(BundleDevices(GetParam(), &devices).ok());
  // nvcc takes 0.2 to 0.5 s a file: an eighth of this architecture's share.
  const std::vector<CudaVariant> variants = VariantsFor(GetParam(), devices.front());
  for (size_t i = 0; i < variants.size(); i += 8) {
    const fs::path file = directory / "variant.cu", log = directory / "log";
    const RopeCudaKey& key = variants[i].key;
    std::ofstream(file) << RopeCudaSource(key);
    const std::string command =
        Text(path, " -cubin -arch=", GetParam(), " -std=c++17 --expt-relaxed-constexpr -Werror all-warnings -I ",
             directory.string(), " -o ", (directory / "variant.cubin").string(), " ", file.string(), " > ",
             log.string(), " 2>&1");
    if (std::system(command.c_str()) == 0) continue;
    std::ifstream text(log);
    ADD_FAILURE() << RopeCudaName(key) << "\n" << std::string(std::istreambuf_iterator<char>(text), {});
    break;
  }
  fs::remove_all(directory);
}

INSTANTIATE_TEST_SUITE_P(All, CudaCompile, ::testing::ValuesIn(BundleArchs()),
                         [](const auto& test) { return test.param; });

// A line without its comment: all up to the first // outside of a text.
std::string_view Code(std::string_view line) {
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\\') ++i;
    if (line[i] == '"') quoted = !quoted;
    if (!quoted && line.substr(i, 2) == "//") line = line.substr(0, i);
  }
  while (line.ends_with(' ')) line.remove_suffix(1);
  return line;
}

// What is embedded is what is in the tree, line by line, without the comments.
TEST(CudaSources, AreTheFiles) {
  for (size_t i = 0; i < kCudaSourceCount; ++i) {
    std::ifstream file(fs::path(ROPEWALK_SOURCE_DIR) / kCudaSources[i].path);
    ASSERT_TRUE(file) << kCudaSources[i].path;
    std::string text, line;
    while (std::getline(file, line)) text.append(Code(line)).append("\n");
    EXPECT_EQ(text, kCudaSources[i].text) << kCudaSources[i].path;
  }
  EXPECT_EQ(std::string(kCudaSourceDigest).size(), 64u);
}

TEST(CudaArchs, WhatRunsWhere) {
  EXPECT_TRUE(ArchServes("sm_90a", {132, 9, 0}));
  EXPECT_FALSE(ArchServes("sm_90a", {132, 10, 0}));
  EXPECT_TRUE(ArchServes("sm_80", {84, 8, 6}));
  EXPECT_FALSE(ArchServes("sm_86", {108, 8, 0}));
  EXPECT_FALSE(ArchServes("sm_100a", {160, 10, 3}));
  EXPECT_TRUE(ArchServes("sm_120", {48, 12, 1}));
  EXPECT_TRUE(ArchServes("sm_100f", {160, 10, 3}));
  for (const char* name : {"", "90", "sm_", "sm_9x0", "compute_90"})
    EXPECT_FALSE(ArchServes(name, {132, 9, 0})) << name;
  EXPECT_EQ(ExactArch({132, 9, 0}), "sm_90a");
  EXPECT_EQ(ExactArch({142, 8, 9}), "sm_89");
}

TEST(CudaPtxas, Read) {
  const PtxasText said = ReadPtxas(
      "x.cu(2): warning #177-D: unused\n"
      "ptxas info    : 195 bytes gmem\n"
      "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
      "ptxas info    : Used 70 registers, used 0 barriers, 16384 bytes smem\n");
  EXPECT_EQ(said.registers, 70);
  EXPECT_EQ(said.shared_bytes, 16384);
  EXPECT_EQ(said.spilled_bytes, 28);
  EXPECT_EQ(said.stack_bytes, 8);
  EXPECT_EQ(said.warnings, "x.cu(2): warning #177-D: unused\n");
}

}  // namespace
}  // namespace ropewalk
