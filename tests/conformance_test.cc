// Every case on every backend and on every CPU target that this machine has, against the reference; the reference
// against numbers worked out by hand; and the runner against kernels that it must find wrong.
// SPDX-License-Identifier: Apache-2.0
#include "conformance/runner.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "conformance/case_call.h"
#include "ops/rope/rope_reference.h"
#include "tests/expect_passed.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ROPEWALK_SLOW 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ROPEWALK_SLOW 1
#endif
#endif

namespace ropewalk {
namespace {

#ifdef ROPEWALK_SLOW
constexpr bool kSlow = true;
#else
constexpr bool kSlow = false;
#endif

// "cpu", and "cpu:avx2" and the like: all that run on host memory here.
std::vector<std::string> HostBackends() {
  std::vector<std::string> names = {"cpu"};
  const nlohmann::json backends = nlohmann::json::parse(ropewalk_backends());
  for (const auto& backend : backends) {
    if (backend.at("name") != "cpu") continue;
    for (const auto& part : backend.at("parts")) names.push_back("cpu:" + part.get<std::string>());
  }
  return names;
}

std::string TestName(const testing::TestParamInfo<std::string>& test) {
  std::string name = test.param;
  for (char& c : name) c = c == ':' ? '_' : c;
  return name;
}

void ExpectAllPass(std::span<const RopeCase> cases, const std::string& backend) {
  const RunSummary summary = RunCases(cases, HostMemory(), {.backend = backend});
  ExpectPassed(summary, cases.size());
  for (const auto& [kernel, count] : summary.kernels) {
    if (backend.find(':') == std::string::npos) continue;
    EXPECT_NE(kernel.find(backend + " "), std::string::npos) << kernel << " served, but " << backend << " is forced";
  }
}

class Conformance : public testing::TestWithParam<std::string> {};

TEST_P(Conformance, AllCases) {
  if (!kSlow || GetParam() == "cpu") return ExpectAllPass(RopeCases(), GetParam());
  std::vector<RopeCase> some;  // under a sanitizer every fourth, but on the best target
  for (size_t i = 0; i < RopeCases().size(); i += 4) some.push_back(RopeCases()[i]);
  ExpectAllPass(some, GetParam());
}

TEST_P(Conformance, RandomCases) { ExpectAllPass(RandomRopeCases(20261123, kSlow ? 40 : 300), GetParam()); }

TEST_P(Conformance, ManyTokensOfOneShape) {
  std::vector<RopeCase> cases;
  for (const int32_t pairing : {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED}) {
    for (const bool norm : {false, true}) {
      RopeCase c = {.tokens = 600,
                    .q_heads = 8,
                    .k_heads = 2,
                    .head_dim = 64,
                    .rotary_dim = 64,
                    .pairing = pairing,
                    .norm = norm,
                    .positions = Positions::kRandom,
                    .cache = Cache::kNhd,
                    .cache_dtype = kBF16,
                    .v_dim = 64};
      c.name = CaseName(c);
      cases.push_back(c);
    }
  }
  ExpectAllPass(cases, GetParam());
}

INSTANTIATE_TEST_SUITE_P(, Conformance, testing::ValuesIn(HostBackends()), TestName);

TEST(Models, EachConfiguration) {
  int models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(ROPEWALK_MODELS_DIR)) {
    if (entry.path().extension() != ".json") continue;
    std::ifstream stream(entry.path());
    const std::string json{std::istreambuf_iterator<char>(stream), {}};
    ModelConfig model;
    const Status status = ReadModelConfig(json, entry.path().string(), &model);
    ASSERT_TRUE(status.ok()) << status.text();
    const std::vector<RopeCase> cases = CasesOfModel(model, json, 4, kBF16);
    EXPECT_FALSE(cases.empty()) << entry.path();
    ExpectAllPass(cases, "cpu");
    ++models;
  }
  EXPECT_GE(models, 18);
}

// ---------------------------------------------------------------------------------------------------------------------
// The list

TEST(Cases, AreManyAndNamedOnce) {
  std::set<std::string> names;
  for (const RopeCase& c : RopeCases()) EXPECT_TRUE(names.insert(c.name).second) << c.name;
  EXPECT_GE(names.size(), 1500u);
  EXPECT_LE(names.size(), 4000u);
}

TEST(Cases, RandomOnesAreOthersAndTheSameAgain) {
  std::set<std::string> names, listed;
  for (const RopeCase& c : RopeCases()) listed.insert(c.name);
  const std::vector<RopeCase> cases = RandomRopeCases(7, 200), again = RandomRopeCases(7, 100);
  ASSERT_EQ(cases.size(), 200u);
  size_t known = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    EXPECT_TRUE(names.insert(cases[i].name).second) << cases[i].name;
    known += listed.contains(cases[i].name);
    if (i < again.size()) {
      EXPECT_EQ(cases[i].name, again[i].name);
    }
  }
  EXPECT_LE(known, 2u);
  EXPECT_FALSE(names.contains(RandomRopeCases(8, 1).front().name));
}

TEST(Cases, EveryOptionOccurs) {
  std::set<std::string> tags;
  for (const RopeCase& c : RopeCases()) {
    for (const std::string& tag : CaseTags(c)) tags.insert(tag);
  }
  for (const char* tag : {"stage=norm",
                          "stage=rotate",
                          "stage=store",
                          "dtype=f32",
                          "dtype=f16",
                          "dtype=bf16",
                          "pairing=neox",
                          "pairing=interleaved",
                          "rotary=part",
                          "rotary=part at an offset",
                          "rotary=whole",
                          "angles=freq",
                          "angles=table",
                          "angles=cossin",
                          "angles=fullwidth",
                          "angles=repeated",
                          "angles=columns",
                          "angles=batchtable",
                          "scaling=default",
                          "scaling=linear",
                          "scaling=dynamic",
                          "scaling=yarn",
                          "scaling=llama3",
                          "scaling=longrope",
                          "scaling=proportional",
                          "rounding=fused",
                          "rounding=reference",
                          "inverse",
                          "weight=none",
                          "weight=plain",
                          "weight=zero_centered",
                          "layout=packed",
                          "layout=transposed",
                          "layout=padded",
                          "layout=misaligned",
                          "layout=reversed",
                          "output=out of place",
                          "no k",
                          "batched",
                          "no tokens",
                          "positions=none",
                          "positions=i32",
                          "positions=i64",
                          "positions=listed",
                          "offsets",
                          "axes=sections",
                          "axes=interleaved",
                          "axes=two",
                          "cache=flat",
                          "cache=nhd",
                          "cache=hnd",
                          "cache=e4m3",
                          "cache=e5m2",
                          "scale=host",
                          "scale=tensor",
                          "scale=heads",
                          "slots=skips",
                          "slots=nothing",
                          "k only stored",
                          "data=nonfinite",
                          "data=tiny",
                          "data=large",
                          "bad position",
                          "bad slot",
                          "bad axis",
                          "bad padding",
                          "model"}) {
    EXPECT_TRUE(tags.count(tag)) << tag;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The reference, pinned by hand

// One token of two or four float32 numbers, at position 1 of the frequencies 1 (and 0.01).
std::vector<double> Rotated(std::vector<float> x, int32_t pairing, bool inverse, bool norm = false) {
  const auto dim = static_cast<int64_t>(x.size());
  int64_t shape[] = {1, 1, dim}, one = 1;
  int32_t position = 1;
  DLTensor q = {x.data(), {kDLCPU, 0}, 3, {kDLFloat, 32, 1}, shape, nullptr, 0};
  DLTensor positions = {&position, {kDLCPU, 0}, 1, {kDLInt, 32, 1}, &one, nullptr, 0};
  ropewalk_frequencies* frequencies = nullptr;
  EXPECT_EQ(ropewalk_frequencies_create(10000.0, dim, nullptr, 0, &frequencies), ROPEWALK_OK);
  ropewalk_rope_args args;
  args.q = &q;
  args.positions = &positions;
  args.frequencies = frequencies;
  args.pairing = pairing;
  args.inverse = inverse;
  args.norm = norm;
  std::vector<double> values;
  RopeReference(args, [&](const ExpectedRow& row) {
    for (const Expected& expected : row.elements) {
      EXPECT_EQ(expected.want, Expected::Want::kRange);
      values.push_back(expected.value);
    }
  });
  ropewalk_frequencies_release(frequencies);
  return values;
}

void ExpectNear(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-12) << i;
}

constexpr double kCos1 = 0.5403023058681398, kSin1 = 0.8414709848078965;
constexpr double kCos001 = 0.9999500004166653, kSin001 = 0.009999833334166664;

TEST(Reference, RotatesOnePair) {
  ExpectNear(Rotated({3, 5}, ROPEWALK_NEOX, false), {3 * kCos1 - 5 * kSin1, 5 * kCos1 + 3 * kSin1});
  ExpectNear(Rotated({3, 5}, ROPEWALK_INTERLEAVED, true), {3 * kCos1 + 5 * kSin1, 5 * kCos1 - 3 * kSin1});
}

TEST(Reference, PairsHalvesOrNeighbours) {
  ExpectNear(Rotated({1, 2, 3, 4}, ROPEWALK_NEOX, false),
             {1 * kCos1 - 3 * kSin1, 2 * kCos001 - 4 * kSin001, 3 * kCos1 + 1 * kSin1, 4 * kCos001 + 2 * kSin001});
  ExpectNear(Rotated({1, 2, 3, 4}, ROPEWALK_INTERLEAVED, false),
             {1 * kCos1 - 2 * kSin1, 2 * kCos1 + 1 * kSin1, 3 * kCos001 - 4 * kSin001, 4 * kCos001 + 3 * kSin001});
}

TEST(Reference, NormalisesFirst) {
  const double scale = 1 / std::sqrt((9.0 + 25.0) / 2 + 1e-6);
  ExpectNear(Rotated({3, 5}, ROPEWALK_NEOX, false, true),
             {scale * (3 * kCos1 - 5 * kSin1), scale * (5 * kCos1 + 3 * kSin1)});
}

TEST(Reference, NumbersSurviveStoreAndLoad) {
  for (const uint32_t dtype : {kF16, kBF16, kE4M3, kE5M2}) {
    const int bits = DtypeBytes(dtype) == 1 ? 8 : 16;
    for (uint32_t pattern = 0; pattern < 1u << bits; ++pattern) {
      const double value = LoadNumber(dtype, &pattern);
      if (std::isnan(value) || std::isinf(value)) continue;
      uint32_t back = 0;
      StoreNumber(dtype, value, &back);
      ASSERT_EQ(back, pattern) << value;
      ASSERT_EQ(RoundNumber(dtype, value), value);
    }
  }
}

TEST(Reference, RoundsToNearestEven) {
  EXPECT_EQ(RoundNumber(kBF16, 1.0 + 0x1p-8), 1.0);
  EXPECT_EQ(RoundNumber(kBF16, 1.0 + 3 * 0x1p-8), 1.0 + 0x1p-6);
  EXPECT_EQ(RoundNumber(kBF16, 1.0 + 0x1p-8 + 0x1p-30), 1.0 + 0x1p-7);
  EXPECT_EQ(RoundNumber(kF16, 65519.0), 65504.0);
  EXPECT_TRUE(std::isinf(RoundNumber(kF16, 65520.0)));
  EXPECT_EQ(RoundNumber(kF16, 0x1p-25), 0.0);
  EXPECT_EQ(RoundNumber(kF16, 1.5 * 0x1p-24), 0x1p-23);
  EXPECT_EQ(RoundNumber(kE4M3, 1e9), 448.0);
  EXPECT_EQ(RoundNumber(kE4M3, -INFINITY), -448.0);
  EXPECT_EQ(RoundNumber(kE4M3, 464.0), 448.0);
  EXPECT_EQ(RoundNumber(kE5M2, 1e9), 57344.0);
  EXPECT_EQ(RoundNumber(kE4M3, 0x1p-10), 0.0);
  EXPECT_TRUE(std::isnan(RoundNumber(kE4M3, NAN)));
}

// ---------------------------------------------------------------------------------------------------------------------
// The runner finds what is wrong

RopeCase SmallCase() {
  RopeCase c = {.tokens = 3,
                .head_dim = 16,
                .rotary_dim = 8,
                .layout = Layout::kPadded,
                .positions = Positions::kRandom,
                .cache = Cache::kNhd,
                .cache_dtype = kBF16,
                .page_size = 4,
                .v_dim = 16,
                .slots = Slots::kSkips};
  c.name = CaseName(c);
  return c;
}

std::string MessageAfter(const std::function<void(ropewalk_rope_args&)>& spoil) {
  std::unique_ptr<CaseCall> call;
  EXPECT_TRUE(CaseCall::Make(SmallCase(), HostMemory(), &call).ok());
  EXPECT_TRUE(call->Run().ok());
  spoil(call->args());
  std::string message;
  double worst;
  int64_t elements;
  EXPECT_TRUE(call->Verify(&message, &worst, &elements).ok());
  EXPECT_GT(elements, 0);
  return message;
}

uint16_t* Bits(DLTensor* tensor, int64_t offset) {
  return reinterpret_cast<uint16_t*>(static_cast<char*>(tensor->data) + tensor->byte_offset) + offset;
}

TEST(Runner, PassesWhatIsRight) {
  EXPECT_EQ(MessageAfter([](auto&) {}), "");
}

TEST(Runner, FindsTwoUnitsInTheLastPlace) {
  const std::string message = MessageAfter([](auto& args) { *Bits(args.q, 21 + 3) += 2; });
  EXPECT_EQ(message.rfind("q[0, 1, 3]: got ", 0), 0u) << message;
}

TEST(Runner, FindsKNotWrittenBack) {
  const std::string message = MessageAfter([](auto& args) { *Bits(args.k, 0) ^= 0x40; });
  EXPECT_EQ(message.rfind("k[0, 0, 0]: got ", 0), 0u) << message;
}

TEST(Runner, FindsAChangedBitOutsideTheRotatedPart) {
  const std::string message = MessageAfter([](auto& args) { *Bits(args.q, 12) ^= 1; });
  EXPECT_EQ(message.rfind("memory of q: byte 24 of ", 0), 0u) << message;
}

TEST(Runner, FindsAWriteIntoAGap) {
  const std::string message = MessageAfter([](auto& args) { *Bits(args.q, 16) = 0; });
  EXPECT_EQ(message.rfind("memory of q: byte 32 of ", 0), 0u) << message;
}

TEST(Runner, FindsAWriteBeforeTheTensor) {
  const std::string message = MessageAfter([](auto& args) { *Bits(args.k, -1) = 0; });
  EXPECT_EQ(message.rfind("memory of k: byte -2 of ", 0), 0u) << message;
}

TEST(Runner, FindsAWriteIntoAnInput) {
  const std::string message = MessageAfter([](auto& args) { *Bits(const_cast<DLTensor*>(args.v), 0) ^= 1; });
  EXPECT_EQ(message.rfind("memory of v: byte 0 of ", 0), 0u) << message;
}

TEST(Runner, FindsAWriteIntoAnUnnamedSlot) {
  const std::string message = MessageAfter([](auto& args) {
    const auto* slots = static_cast<const int64_t*>(args.slots->data);
    int64_t free = 0;
    while (free == slots[0] || free == slots[1]) ++free;
    *Bits(args.v_cache, free * 2 * 16) ^= 1;
  });
  EXPECT_EQ(message.rfind("memory of v_cache: byte ", 0), 0u) << message;
}

TEST(Runner, FindsAWrongCopyInTheCache) {
  const std::string message = MessageAfter([](auto& args) {
    const auto* slots = static_cast<const int64_t*>(args.slots->data);
    *Bits(args.v_cache, slots[1] * 2 * 16) ^= 1;
  });
  EXPECT_EQ(message.rfind("v_cache[", 0), 0u) << message;
}

TEST(Runner, NothingRanIsAFailure) {
  const RunSummary summary = RunCases(RopeCases(), HostMemory(), {.filter = "no such case"});
  EXPECT_FALSE(summary.ok());
  EXPECT_NE(summary.error.find("nothing ran"), std::string::npos) << summary.error;
  EXPECT_FALSE(RunCases({}, HostMemory(), {}).ok());
}

TEST(Runner, AnAbsentBackendIsAFailure) {
  const RunSummary summary = RunCases(RopeCases(), HostMemory(), {.backend = "abacus"});
  EXPECT_FALSE(summary.ok());
  EXPECT_EQ(summary.run, 0);
  EXPECT_NE(summary.error.find("abacus"), std::string::npos) << summary.error;
}

TEST(Runner, Filters) {
  EXPECT_TRUE(MatchesFilter("rope.bf16.neox", ""));
  EXPECT_TRUE(MatchesFilter("rope.bf16.neox", "bf16"));
  EXPECT_FALSE(MatchesFilter("rope.bf16.neox", "f32"));
  EXPECT_TRUE(MatchesFilter("rope.bf16.neox", "*.neox"));
  EXPECT_TRUE(MatchesFilter("rope.bf16.neox", "rope.*6.n??x"));
  EXPECT_FALSE(MatchesFilter("rope.bf16.neox", "bf16*"));
  EXPECT_FALSE(MatchesFilter("rope.bf16.neox", "*.neo"));
}

TEST(Runner, AFailureSaysHowToRunItAlone) {
  std::vector<RopeCase> cases = {SmallCase()};
  cases[0].scaling = "{\"rope_type\": \"sideways\"}";  // the call cannot be made
  cases[0].name = "rope.sideways";
  const RunSummary summary = RunCases(cases, HostMemory(), {.backend = "cpu"});
  ASSERT_EQ(summary.failures.size(), 1u);
  EXPECT_EQ(summary.failures[0].rerun, "ropewalk check --backend cpu --case 'rope.sideways'");
  EXPECT_NE(summary.failures[0].message.find("sideways"), std::string::npos) << summary.failures[0].message;
}

TEST(Runner, AWholeNameRunsAlone) {
  for (const RopeCase& c : {RopeCases().front(), RopeCases().back()}) {
    EXPECT_EQ(RunCases(RopeCases(), HostMemory(), {.filter = c.name}).run, 1) << c.name;
  }
}

}  // namespace
}  // namespace ropewalk
