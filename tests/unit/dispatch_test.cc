// Which kernel serves: what is forced really runs, explain() and the counters agree, unknown names are refused.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "conformance/case_call.h"
#include "conformance/runner.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

using Json = nlohmann::json;

std::vector<std::string> Parts() {
  const Json backends = Json::parse(ropewalk_backends());
  for (const Json& backend : backends) {
    if (backend.at("name") == "cpu") return backend.at("parts");
  }
  return {};
}

Json Explain(CaseCall& call) {
  const char* text = ropewalk_explain(&call.args());
  EXPECT_NE(text, nullptr) << ropewalk_last_error();
  return text ? Json::parse(text) : Json::object();
}

int64_t CountOf(const std::string& kernel) { return Json::parse(ropewalk_counters()).value(kernel, int64_t{0}); }
int64_t CountOfAll() {
  const Json counters = Json::parse(ropewalk_counters());
  int64_t sum = 0;
  for (const Json& count : counters) sum += count.get<int64_t>();
  return sum;
}

class Dispatch : public testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(ropewalk_force_backend(nullptr), ROPEWALK_OK); }
};

// Rows of more pairs than a mask of 64 bits has, which fill no whole vectors: a shift by more than the mask's width,
// which a sanitizer tells, and no processor there is does wrong.
TEST_F(Dispatch, TablesOfMoreThan64PairsOnEveryTarget) {
  for (const std::string& part : Parts()) {
    ASSERT_EQ(ropewalk_force_backend(("cpu:" + part).c_str()), ROPEWALK_OK) << ropewalk_last_error();
    for (const int64_t head_dim : {134, 200, 266}) {
      for (const uint32_t table_dtype : {kBF16, kF16, kF32}) {
        const auto call = MakeCall({.tokens = 3,
                                    .head_dim = head_dim,
                                    .rotary_dim = head_dim,
                                    .angles = Angles::kPacked,
                                    .table_dtype = table_dtype,
                                    .positions = Positions::kRandom});
        ASSERT_TRUE(call->Run().ok()) << ropewalk_last_error();
        EXPECT_EQ(MessageOf(*call), "") << part << " " << head_dim;
      }
    }
  }
}

TEST_F(Dispatch, TheCpuIsAlwaysThere) {
  const Json backends = Json::parse(ropewalk_backends());
  std::set<std::string> names;
  for (const Json& backend : backends) {
    names.insert(backend.at("name"));
    EXPECT_TRUE(backend.at("available").is_boolean());
    EXPECT_FALSE(backend.at("detail").get<std::string>().empty());
    EXPECT_TRUE(backend.at("name") != "cpu" || backend.at("available"));
    EXPECT_TRUE(backend.at("available") || !backend.at("remedy").get<std::string>().empty()) << backend.dump();
  }
  EXPECT_EQ(names.size(), backends.size());
  EXPECT_TRUE(names.count("cpu"));
  EXPECT_FALSE(Parts().empty());
}

TEST_F(Dispatch, AForcedTargetIsTheOneThatRuns) {
  for (const std::string& part : Parts()) {
    SCOPED_TRACE(part);
    ASSERT_EQ(ropewalk_force_backend(("cpu:" + part).c_str()), ROPEWALK_OK) << ropewalk_last_error();
    const auto call = MakeCall({.head_dim = 64, .norm = true});
    const Json explanation = Explain(*call);
    EXPECT_EQ(explanation.at("backend"), "cpu");
    const std::string kernel = explanation.at("kernel");
    EXPECT_EQ(kernel.rfind("cpu:" + part + " ", 0), 0u) << kernel;
    const int64_t before = CountOf(kernel), all = CountOfAll();
    ASSERT_TRUE(call->Run().ok());
    EXPECT_EQ(CountOf(kernel), before + 1) << kernel;
    EXPECT_EQ(CountOfAll(), all + 1);
  }
}

TEST_F(Dispatch, UnforcedTheBestTargetRuns) {
  const auto call = MakeCall({.head_dim = 64});
  const std::string kernel = Explain(*call).at("kernel");
  EXPECT_EQ(kernel.rfind("cpu:" + Parts().front() + " ", 0), 0u) << kernel;
  ASSERT_EQ(ropewalk_force_backend("cpu"), ROPEWALK_OK);
  EXPECT_EQ(Explain(*call).at("kernel"), kernel);
  const int64_t before = CountOf(kernel);
  ASSERT_TRUE(call->Run().ok());
  EXPECT_EQ(CountOf(kernel), before + 1);
}

TEST_F(Dispatch, UnknownNamesAreRefused) {
  const auto call = MakeCall({.head_dim = 64});
  const std::string kernel = Explain(*call).at("kernel");
  for (const char* name : {"abacus", "cpu:abacus", "CPU", "cpu:avx2 ", ":avx2"}) {
    EXPECT_EQ(ropewalk_force_backend(name), ROPEWALK_INVALID_ARGUMENT) << name;
    const std::string text = ropewalk_last_error();
    EXPECT_NE(text.find(name + std::string(name).find(':') + 1), std::string::npos) << text;
    EXPECT_NE(text.find(std::string(name).rfind("cpu:", 0) == 0 ? Parts().front() : "cpu"), std::string::npos) << text;
  }
  EXPECT_EQ(Explain(*call).at("kernel"), kernel);  // as before
}

TEST_F(Dispatch, AnAbsentBackendSaysWhy) {
  const Json backends = Json::parse(ropewalk_backends());
  for (const Json& backend : backends) {
    if (backend.at("available")) continue;
    const std::string name = backend.at("name");
    EXPECT_EQ(ropewalk_force_backend(name.c_str()), ROPEWALK_UNAVAILABLE);
    EXPECT_NE(std::string(ropewalk_last_error()).find(backend.at("detail").get<std::string>()), std::string::npos);
  }
  const auto call = MakeCall({.head_dim = 64});
  EXPECT_TRUE(call->Run().ok());
}

TEST_F(Dispatch, AnEmptyNameEndsForcing) {
  const auto call = MakeCall({.head_dim = 64});
  const std::string best = Explain(*call).at("kernel");
  for (const char* ending : {static_cast<const char*>(nullptr), ""}) {
    ASSERT_EQ(ropewalk_force_backend(("cpu:" + Parts().back()).c_str()), ROPEWALK_OK);
    EXPECT_EQ(Parts().size() > 1, Explain(*call).at("kernel") != best);
    ASSERT_EQ(ropewalk_force_backend(ending), ROPEWALK_OK);
    EXPECT_EQ(Explain(*call).at("kernel"), best);
  }
}

// What is chosen by itself can be named, and what explain() promises is what the counters count.
TEST_F(Dispatch, ExplainAndCountersAgreeForEveryKernel) {
  std::set<std::string> kernels;
  for (size_t i = 0; i < RopeCases().size(); i += 5) {
    const RopeCase& c = RopeCases()[i];
    if (c.tokens == 0 || c.bad != Bad::kNone) continue;
    const auto call = MakeCall(c);
    const std::string kernel = Explain(*call).at("kernel");
    const int64_t before = CountOf(kernel);
    ASSERT_TRUE(call->Run().ok()) << c.name;
    ASSERT_EQ(CountOf(kernel), before + 1) << c.name << ": " << kernel;
    kernels.insert(kernel);
  }
  EXPECT_GE(kernels.size(), 30u);
}

TEST_F(Dispatch, ExplainAndPrepareRunNothing) {
  const auto call = MakeCall({.head_dim = 64, .norm = true, .cache = Cache::kFlat, .cache_dtype = kBF16, .v_dim = 64});
  const int64_t before = CountOfAll();
  Explain(*call);
  EXPECT_EQ(ropewalk_prepare(&call->args()), ROPEWALK_OK);
  EXPECT_EQ(CountOfAll(), before);
  std::string message;
  ASSERT_TRUE(call->VerifyUntouched(&message).ok());
  EXPECT_EQ(message, "");
}

}  // namespace
}  // namespace ropewalk
