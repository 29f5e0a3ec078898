// The CUDA kernel itself, run on the processor: the body that NVRTC would get is compiled by the C++ compiler for each
// variant (emulated_nvrtc.cc), and launches run it with the lanes of a warp in turn (emulated_gpu.cc). Here a sample,
// as a variant takes a quarter of a second to compile; scripts/test.sh emulated runs every case. What only a GPU shows
// remains for `make gpu-test`: its arithmetic's last bits, its memory's order and its speed.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <ropewalk/ropewalk.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "conformance/cases.h"
#include "conformance/runner.h"
#include "tests/fresh_process.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

#ifdef ROPEWALK_EMULATED_LIBCUDA

constexpr size_t kStep = 53;  // every so many cases

// `changes`: of the environment, beside the emulated GPU and a cache of this name.
void OnEmulatedGpu(const std::string& cache, const Environment& changes, const std::function<void()>& body) {
  InChild([&] {
    ChangeEnvironment({"ROPEWALK_PDL", "ROPEWALK_BUNDLE", "ROPEWALK_CUDA_LINEINFO"},
                      {{"ROPEWALK_LIBCUDA", ROPEWALK_EMULATED_LIBCUDA},
                       {"ROPEWALK_LIBNVRTC", ROPEWALK_EMULATED_NVRTC},
                       {"ROPEWALK_CACHE_DIR", Directory() + "/" + cache},
                       {"FAKE_CUDA_LEGACY_STREAM", "1"}});
    ChangeEnvironment({}, changes);
    PrintCaseOnCrash();
    body();
  });
}

RunSummary RunOnIt(const std::vector<RopeCase>& cases, const char* backend, const std::string& source = "") {
  RunSummary summary = RunCases(cases, CudaMemory(), {.backend = backend, .source = source});
  for (const auto& [kernel, count] : summary.kernels)
    EXPECT_TRUE(kernel.starts_with("cuda ") || kernel == "none") << kernel;
  return summary;
}

void ExpectAllPass(const std::vector<RopeCase>& cases, const char* backend, const std::string& what,
                   const std::string& source = "") {
  const RunSummary summary = RunOnIt(cases, backend, source);
  ExpectPassed(summary, cases.size());
  if (summary.failed == 0) Report(Text(summary.run, " cases on an emulated CUDA GPU: ", what));
}

std::vector<RopeCase> Which(const std::function<bool(const RopeCase&)>& which, size_t step = 1) {
  std::vector<RopeCase> cases;
  size_t i = 0;
  for (const RopeCase& c : RopeCases()) {
    if (which(c) && i++ % step == 0) cases.push_back(c);
  }
  return cases;
}
bool Long(const RopeCase& c) { return c.tokens >= 1000; }
bool Short(const RopeCase& c) { return !Long(c); }

TEST(CudaEmulated, LayoutForFewTokens) {
  OnEmulatedGpu("few", {}, [] {
    ExpectAllPass(Which(Short, kStep), "cuda:few", Text("1 in ", kStep, ", layout for few tokens"));
  });
}
TEST(CudaEmulated, LayoutForManyTokens) {
  OnEmulatedGpu("many", {}, [] {
    ExpectAllPass(Which(Short, kStep), "cuda:many", Text("1 in ", kStep, ", layout for many tokens"));
  });
}
TEST(CudaEmulated, ManyTokens) {
  OnEmulatedGpu("long", {}, [] {
    const std::vector<RopeCase> cases = Which(Long);
    ASSERT_GE(cases.size(), 20u);
    ExpectAllPass(cases, "cuda", "those of a thousand tokens and more");
  });
}
TEST(CudaEmulated, RandomCases) {
  OnEmulatedGpu("random", {}, [] {
    const std::vector<RopeCase> cases = RandomRopeCases(20261123, 60);
    for (const char* layout : {"cuda:few", "cuda:many"})
      ExpectAllPass(cases, layout, Text("random ones, ", layout), "--random 60 --seed 20261123");
  });
}
// Heads that make no whole number of blocks.
TEST(CudaEmulated, UnevenHeads) {
  OnEmulatedGpu("uneven", {}, [] {
    const auto cases = Which([](const RopeCase& c) { return c.model.empty() && c.q_heads >= 20; });
    ASSERT_GE(cases.size(), 40u);
    ExpectAllPass(cases, "cuda", "heads that make no whole number of blocks");
  });
}

// A thread takes several units of a head: of heads whose size is a power of two and of others, with and without a rest.
TEST(CudaEmulated, SeveralUnitsOfAThread) {
  OnEmulatedGpu("units", {}, [] {
    const auto cases = Which(
        [](const RopeCase& c) {
          return Short(c) && c.dtype == kBF16 && c.norm && c.head_dim >= 80 && c.head_dim <= 192 && c.bad == Bad::kNone;
        },
        23);
    ASSERT_GE(cases.size(), 8u);
    std::set<std::string> lanes;
    for (const uint8_t few : {uint8_t{0}, uint8_t{1}}) {
      for (const uint8_t share : {uint8_t{2}, uint8_t{3}, uint8_t{5}}) {
        RopeCudaShape shape;
        shape.few = few;
        shape.vector = 4;
        shape.in_flight = shape.cut = 2;
        shape.share = share;
        TryRopeCudaShape(shape);
        const RunSummary summary = RunOnIt(cases, "cuda");
        ExpectPassed(summary, cases.size());
        for (const auto& [kernel, count] : summary.kernels) {
          const size_t at = kernel.find(few ? " few v4 l" : " many v4 l");
          if (at != std::string::npos) lanes.insert(kernel.substr(kernel.find(" l", at) + 2, 2));
        }
      }
    }
    TryRopeCudaShape(std::nullopt);
    for (const char* fewer : {"8 ", "5 "})
      EXPECT_TRUE(lanes.contains(fewer)) << "no kernel with so many lanes: " << fewer;
  });
}

// The gradient: cases of the list, and random ones. Their kernel is compiled like any other.
void ExpectGradients(const std::vector<RopeCase>& cases, const char* what) {
  ASSERT_TRUE(force_backend("cuda"));
  ExpectGradientsPass(cases, CudaMemory(), "cuda", Text("an emulated CUDA GPU: ", what));
}

TEST(CudaEmulated, Gradients) {
  OnEmulatedGpu("gradients", {}, [] { ExpectGradients(BackwardCases(31), "1 in 31"); });
}
TEST(CudaEmulated, RandomGradients) {
  OnEmulatedGpu("random_gradients", {}, [] { ExpectGradients(RandomBackwardCases(7, 60), "random ones"); });
}
// On one multiprocessor each warp takes many pieces, in turns that begin and end anywhere in a token; of all sizes and
// layouts of heads, also those whose groups leave lanes idle.
TEST(CudaEmulated, GradientsOnOneMultiprocessor) {
  OnEmulatedGpu("small_gpu", {{"FAKE_CUDA_SMS", "1"}}, [] {
    std::vector<RopeCase> cases = RandomBackwardCases(8, 24);
    for (const int64_t head_dim : {72, 80, 96, 104, 112, 128, 208}) {
      for (const uint32_t dtype : {kBF16, kF32}) {
        RopeCase c;
        c.dtype = dtype;
        c.head_dim = head_dim;
        c.tokens = 150 + head_dim;
        c.q_heads = head_dim % 3 ? 7 : 12;
        c.k_heads = head_dim % 3 ? 1 : 4;
        c.norm = true;
        c.weight = Weight::kZeroCentered;
        c.weight_dtype = dtype;
        c.out_of_place = head_dim % 16 != 0;
        if (head_dim % 5 == 0 || head_dim == 112) c.batch = 3;
        if (head_dim == 80 || head_dim == 112 || head_dim == 96) {
          c.angles = Angles::kTable;
          c.positions = Positions::kRandom;
          c.bad = Bad::kPosition;
        }
        c.name = CaseName(c);
        cases.push_back(c);
      }
    }
    ExpectGradients(cases, "on one multiprocessor");
  });
}
// More tokens than the warps of all blocks take at once; the same bits each time.
TEST(CudaEmulated, GradientsOfManyTokens) {
  OnEmulatedGpu("long_gradients", {}, [] {
    RopeCase c;
    c.tokens = 9000;
    c.q_heads = 3;
    c.k_heads = 1;
    c.head_dim = 16;
    c.norm = true;
    c.weight = Weight::kPlain;
    c.weight_dtype = kF32;
    c.name = CaseName(c);
    ExpectGradients({c, c}, "9,000 tokens");
  });
}

// What engines send, to every fourth model, shared among processes; `make test-models` runs all.
constexpr int kProcesses = 4;
class CudaEmulatedModels : public testing::TestWithParam<int> {};

TEST_P(CudaEmulatedModels, Heads) {
  OnEmulatedGpu(Text("models", GetParam()), {}, [] {
    const std::vector<RopeCase> all = EngineCases(false);
    std::vector<RopeCase> own;
    for (size_t i = 0; i < all.size(); ++i) {
      if (i / 5 % (4 * kProcesses) == static_cast<size_t>(GetParam())) own.push_back(all[i]);
    }
    ASSERT_GE(own.size(), 20u);
    ExpectAllPass(own, "cuda", "the heads of models", "--engines");
  });
}
INSTANTIATE_TEST_SUITE_P(, CudaEmulatedModels, testing::Range(0, kProcesses));

// ---------------------------------------------------------------------------------------------------------------------
// What the emulation is to see: each text is left out of the kernel's sources, or put for another one.

struct Mistake {
  const char* name;
  const char* text;
  const char* instead;
  friend std::ostream& operator<<(std::ostream& out, const Mistake& mistake) { return out << mistake.name; }
};

class CudaEmulatedSees : public testing::TestWithParam<Mistake> {};

TEST_P(CudaEmulatedSees, It) {
  const Mistake& mistake = GetParam();
  OnEmulatedGpu(mistake.name, {{"EMULATED_REPLACE", mistake.text}, {"EMULATED_BY", mistake.instead}}, [] {
    // Fetched side by side by the lanes of a warp, normalised; many turns.
    const std::vector<RopeCase> cases = Which([](const RopeCase& c) {
      return Short(c) && c.norm && c.head_dim == 80 && c.rotary_dim == 80 && c.rounding == ROPEWALK_ROUND_FUSED &&
             c.layout == Layout::kSeparate && c.bad == Bad::kNone && c.tokens > 2;
    });
    ASSERT_GE(cases.size(), 2u);
    const RunSummary summary = RunOnIt(cases, "cuda:many");
    EXPECT_GT(summary.failed, 0) << "of " << summary.run << " cases";
    for (const CaseResult& failure : summary.failures)
      EXPECT_EQ(failure.message.find("failed:"), std::string::npos) << failure.message;  // to compile, say
  });
}

INSTANTIATE_TEST_SUITE_P(, CudaEmulatedSees,
                         testing::Values(Mistake{"LanesThatDoNotMeet", "__syncwarp();", ";"},
                                         Mistake{"CopiesThatAreNotWaitedFor", "cp.async.wait_group %0;", ""},
                                         Mistake{"AHeadTooFar", "+ static_cast<rw_i64>(h) *",
                                                 "+ static_cast<rw_i64>(h + 1) *"},
                                         Mistake{"ASumOfOtherLanes", "at < kLanes ? at : at - kLanes", "at"}),
                         [](const auto& test) { return test.param.name; });

#else
TEST(CudaEmulated, Cases) { GTEST_SKIP() << "built for another machine, or with a sanitizer, which fibers confuse"; }
#endif

}  // namespace
}  // namespace ropewalk
