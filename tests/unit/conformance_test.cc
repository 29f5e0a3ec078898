// Every case on every backend and on every CPU target that this machine has, against the reference; the reference
// against numbers worked out by hand; and the runner against kernels that it must find wrong.
// SPDX-License-Identifier: Apache-2.0
#include "conformance/runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/models.h"
#include "conformance/reference.h"
#include "tests/run_cases.h"

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

void ExpectAllPass(std::span<const RopeCase> cases, const std::string& backend, const std::string& source = "") {
  const RunSummary summary = RunCases(cases, HostMemory(), {.backend = backend, .source = source});
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

TEST_P(Conformance, RandomCases) {
  const int64_t count = kSlow ? 40 : 300;
  ExpectAllPass(RandomRopeCases(20261123, count), GetParam(), Text("--random ", count, " --seed 20261123"));
}

TEST_P(Conformance, HeadsOfModels) {
  std::vector<RopeCase> cases = EngineCases(false);
  ASSERT_GE(cases.size(), 300u);
  if (GetParam() != "cpu") {  // which is the best target: of the others every third model's, five each
    size_t i = 0;
    std::erase_if(cases, [&](const RopeCase&) { return i++ / 5 % 3 != 0; });
  }
  if (kSlow) cases.erase(std::remove_if(cases.begin(), cases.end(), [](auto& c) { return c.tokens > 7; }), cases.end());
  ExpectAllPass(cases, GetParam(), "--engines");
}

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
  for (const ConfigText& config : OurModels()) {
    ModelConfig model;
    const Status status = ReadModelConfig(config.json, config.place, &model);
    ASSERT_TRUE(status.ok()) << status.text();
    const std::vector<RopeCase> cases = CasesOfModel(model, config.json, 4, kBF16);
    EXPECT_FALSE(cases.empty()) << config.place;
    ExpectAllPass(cases, "cpu");
    ++models;
  }
  EXPECT_GE(models, 18);
}

TEST(Models, HeadsAreWholeAndNamedOnce) {
  std::set<std::string> names;
  for (const ModelHeads& model : AllModelHeads()) {
    SCOPED_TRACE(model.name);
    EXPECT_TRUE(names.insert(model.name).second);
    EXPECT_GT(model.k_heads, 0);
    EXPECT_EQ(model.q_heads % model.k_heads, 0);
    EXPECT_EQ(model.rotary_dim % 2, 0);
    EXPECT_GT(model.rotary_dim, 0);
    EXPECT_LE(model.rotary_dim + model.rotary_offset, model.head_dim);
    const std::string source = model.source;
    EXPECT_TRUE(source.find('/') != std::string::npos && source.find(' ') == std::string::npos) << source;
  }
  EXPECT_GE(names.size(), 60u);
}

// Those whose config.json comes with Ropewalk.
TEST(Models, HeadsAreThoseOfTheConfigurations) {
  int compared = 0;
  for (const auto& [name, place, json] : OurModels()) {
    ModelConfig config;
    ASSERT_TRUE(ReadModelConfig(json, place, &config).ok());
    for (const ModelHeads& model : AllModelHeads()) {
      if (nlohmann::json::parse(json).value("_name_or_path", "") != model.source) continue;
      if (std::string(model.name).find("vision") != std::string::npos) continue;
      SCOPED_TRACE(model.name);
      EXPECT_EQ(model.q_heads, config.q_heads);
      const bool latent = model.rotary_offset != 0;  // one head of k is rotated, for all heads of q
      EXPECT_EQ(model.k_heads, latent ? 1 : config.k_heads);
      EXPECT_EQ(model.head_dim, config.head_dim);
      EXPECT_EQ(model.rotary_dim, config.rule.rotary_dim);
      EXPECT_EQ(model.rotary_offset, config.rotary_offset);
      EXPECT_EQ(model.pairing == ROPEWALK_INTERLEAVED, config.interleaved);
      EXPECT_EQ(model.norm != HeadNorm::kNone, config.norm);
      EXPECT_EQ(model.norm == HeadNorm::kZeroCentered, config.norm && config.zero_centered_weight);
      ++compared;
    }
  }
  EXPECT_GE(compared, 16);
}

TEST(Models, HeadsOfRanks) {
  const auto split = [](const char* name, int32_t ranks) {
    for (const ModelHeads& model : AllModelHeads()) {
      int64_t q = 0, k = 0;
      if (std::string(model.name) == name) return SplitHeads(model, ranks, &q, &k) ? Text(q, "/", k) : Text("no");
    }
    return Text("no such model");
  };
  EXPECT_EQ(split("Phi-4", 1), "40/10");
  EXPECT_EQ(split("Phi-4", 2), "20/5");
  EXPECT_EQ(split("Phi-4", 4), "no");         // 10 heads of k
  EXPECT_EQ(split("GLM-4-9B", 8), "4/1");     // 2 heads of k, each on four ranks
  EXPECT_EQ(split("SmolLM2-135M", 2), "no");  // 9 heads of q
  EXPECT_EQ(split("DeepSeek-V3", 8), "16/1");
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

// Whatever an engine may send comes up, and none costs more than a second.
TEST(Cases, RandomOnesAreWhatEnginesSend) {
  std::set<std::string> models, tags;
  std::set<int64_t> q_heads, magnitudes, page_sizes;
  for (const RopeCase& c : RandomRopeCases(3, 6000)) {
    if (const size_t rank = c.model.find("-rank"); rank != std::string::npos) {
      models.insert(c.model.substr(0, rank));
      tags.insert(c.model.substr(rank));
    }
    for (const std::string& tag : CaseTags(c)) tags.insert(tag);
    q_heads.insert(c.q_heads);
    page_sizes.insert(c.page_size);
    int64_t magnitude = 1;
    while (magnitude < c.tokens) magnitude *= 2;
    magnitudes.insert(magnitude);
    EXPECT_LE(c.tokens, 8192) << c.name;
    EXPECT_LE(std::max<int64_t>(c.batch, 1) * c.tokens * (c.q_heads + 2 * c.k_heads) * c.head_dim, 1 << 22) << c.name;
  }
  EXPECT_GE(models.size(), 60u);
  EXPECT_GE(q_heads.size(), 150u);
  EXPECT_GE(*q_heads.rbegin(), 200);
  EXPECT_EQ(magnitudes.size(), 14u);  // 1 to 8192
  EXPECT_GE(page_sizes.size(), 5u);
  for (const char* tag : {"-rank1",
                          "-rank2",
                          "-rank4",
                          "-rank8",
                          "layout=packed",
                          "layout=separate",
                          "layout=transposed",
                          "layout=gap behind a row",
                          "layout=v behind k",
                          "batched",
                          "output=out of place",
                          "output=in place",
                          "no k",
                          "weight=plain",
                          "weight=none",
                          "weight=zero_centered",
                          "angles=freq",
                          "angles=table",
                          "angles=cossin",
                          "cache=flat",
                          "cache=nhd",
                          "cache=hnd",
                          "cache=e4m3",
                          "cache=e5m2",
                          "slots=skips",
                          "slots=nothing",
                          "dtype=f32",
                          "dtype=f16",
                          "dtype=bf16",
                          "bad slot",
                          "data=nonfinite"}) {
    EXPECT_TRUE(tags.count(tag)) << tag;
  }
}

// In order: a model's calls follow each other.
TEST(Cases, EnginesSendEveryModel) {
  std::set<std::string> models, tags;
  for (const RopeCase& c : EngineCases(false)) {
    models.insert(c.model);
    for (const std::string& tag : CaseTags(c)) tags.insert(tag);
  }
  EXPECT_EQ(models.size(), AllModelHeads().size());
  for (const char* tag : {"stage=norm", "stage=store", "angles=cossin", "pairing=neox", "pairing=interleaved",
                          "cache=e4m3", "cache=e5m2", "layout=gap behind a row", "layout=v behind k", "batched"}) {
    EXPECT_TRUE(tags.count(tag)) << tag;
  }
  const std::vector<RopeCase> all = EngineCases(true);
  EXPECT_GE(all.size(), 10000u);
  std::set<std::string> names;
  for (const RopeCase& c : all) names.insert(c.name);
  for (const RopeCase& c : EngineCases(false)) EXPECT_TRUE(names.contains(c.name)) << c.name;
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

std::string MessageAfter(const std::function<void(ropewalk_rope_args&)>& spoil, const RopeCase& c = SmallCase()) {
  std::unique_ptr<CaseCall> call;
  EXPECT_TRUE(CaseCall::Make(c, HostMemory(), &call).ok());
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

// Guards of 4 KB before and behind every tensor that is written.
TEST(Runner, FindsAWriteFarFromTheTensor) {
  for (const bool behind : {false, true}) {
    for (DLTensor* ropewalk_rope_args::*which :
         {&ropewalk_rope_args::q, &ropewalk_rope_args::k, &ropewalk_rope_args::k_cache, &ropewalk_rope_args::v_cache}) {
      const std::string message = MessageAfter([&](auto& args) {
        const DLTensor& t = *(args.*which);
        int64_t last = 0;
        for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
        *Bits(args.*which, behind ? last + 2040 : -2048) ^= 1;
      });
      EXPECT_EQ(message.rfind("memory of ", 0), 0u) << behind << message;
      EXPECT_NE(message.find("must not change, but did"), std::string::npos) << message;
    }
  }
}

RopeCase PackedCase(bool v_behind, int64_t row_gap) {
  RopeCase c = {.tokens = 3,
                .head_dim = 16,
                .rotary_dim = 16,
                .layout = Layout::kPacked,
                .row_gap = row_gap,
                .v_behind = v_behind};
  c.name = CaseName(c);
  return c;
}

TEST(Runner, FindsAWriteIntoVOfARow) {
  const auto spoil = [](auto& args) { *Bits(args.q, 5 * 16) ^= 1; };
  EXPECT_EQ(MessageAfter(spoil, PackedCase(true, 0)).rfind("memory of q+k+v: byte 160 of ", 0), 0u)
      << MessageAfter(spoil, PackedCase(true, 0));
  EXPECT_EQ(MessageAfter([](auto&) {}, PackedCase(true, 8)), "");
}

TEST(Runner, FindsAWriteIntoTheGapBehindARow) {
  const auto spoil = [](auto& args) { *Bits(args.q, 5 * 16 + 3) = 0; };
  EXPECT_EQ(MessageAfter(spoil, PackedCase(false, 4)).rfind("memory of q+k: byte 166 of ", 0), 0u)
      << MessageAfter(spoil, PackedCase(false, 4));
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
  const RunSummary random = RunCases(cases, HostMemory(), {.backend = "cpu", .source = "--random 9 --seed 4"});
  ASSERT_EQ(random.failures.size(), 1u);
  EXPECT_EQ(random.failures[0].rerun, "ropewalk check --backend cpu --case 'rope.sideways' --random 9 --seed 4");
  EXPECT_NE(summary.failures[0].message.find("sideways"), std::string::npos) << summary.failures[0].message;
}

// A device that is lost when a case runs on it: those after it do not run, and are not said to have failed.
TEST(Runner, ALostDeviceEndsTheRun) {
  class Lost final : public DeviceMemory {
   public:
    DLDevice device() const override { return HostMemory().device(); }
    Status Allocate(size_t bytes, void** out) override { return HostMemory().Allocate(bytes, out); }
    void Free(void* memory) override { HostMemory().Free(memory); }
    Status CopyIn(void* to, const void* from, size_t bytes) override { return HostMemory().CopyIn(to, from, bytes); }
    Status CopyOut(void* to, const void* from, size_t bytes) override { return HostMemory().CopyOut(to, from, bytes); }
    Status Synchronize() override { return ++calls < 2 ? Status() : Status::Driver("misaligned address"); }
    int calls = 0;
  } memory;
  std::vector<RopeCase> cases(3, SmallCase());
  const RunSummary summary = RunCases(cases, memory, {.backend = "cpu"});
  EXPECT_FALSE(summary.ok());
  EXPECT_EQ(summary.run, 1);
  EXPECT_NE(summary.error.find("2 cases did not run"), std::string::npos) << summary.error;
  EXPECT_NE(summary.error.find("misaligned address"), std::string::npos) << summary.error;
}

TEST(Runner, ACrashSaysHowToRunTheCase) {
  const auto crash = [] {
    PrintCaseOnCrash();
    (void)RunCases(std::vector<RopeCase>{SmallCase()}, HostMemory(),
                   {.backend = "cpu", .source = "--random 9 --seed 4", .progress = [](auto&, auto, auto) {}});
    // In the midst of a case: a memory that ends the process.
    class Ends final : public DeviceMemory {
     public:
      DLDevice device() const override { return HostMemory().device(); }
      Status Allocate(size_t, void**) override { std::abort(); }
      void Free(void*) override {}
      Status CopyIn(void*, const void*, size_t) override { return {}; }
      Status CopyOut(void*, const void*, size_t) override { return {}; }
      Status Synchronize() override { return {}; }
    } memory;
    (void)RunCases(std::vector<RopeCase>{SmallCase()}, memory, {.backend = "cpu", .source = "--random 9 --seed 4"});
  };
  EXPECT_DEATH(crash(), "the process ended in: ropewalk check --backend cpu --case 'rope\\..*' --random 9 --seed 4");
}

TEST(Runner, AWholeNameRunsAlone) {
  for (const RopeCase& c : {RopeCases().front(), RopeCases().back()}) {
    EXPECT_EQ(RunCases(RopeCases(), HostMemory(), {.filter = c.name}).run, 1) << c.name;
  }
}

}  // namespace
}  // namespace ropewalk
