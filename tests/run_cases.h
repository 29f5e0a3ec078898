// What tests do with cases: make one ready to run, for tests that look closer than the runner does; expect that all
// passed; tell the summary of scripts/test.sh what ran where. And the models that come with Ropewalk.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/models.h"
#include "conformance/runner.h"

namespace ropewalk {

inline std::unique_ptr<CaseCall> MakeCall(RopeCase c, DeviceMemory& memory = HostMemory()) {
  c.name = CaseName(c);
  std::unique_ptr<CaseCall> call;
  const Status status = CaseCall::Make(c, memory, &call);
  EXPECT_TRUE(status.ok()) << status.text();
  return call;
}

// What is wrong with the result; "" if nothing.
inline std::string MessageOf(const CaseCall& call) {
  std::string message;
  double worst;
  int64_t elements;
  const Status status = call.Verify(&message, &worst, &elements);
  return status.ok() ? message : status.text();
}

// That `count` cases ran and all passed; shows the first 20 that did not.
inline void ExpectPassed(const RunSummary& summary, size_t count) {
  EXPECT_TRUE(summary.ok()) << summary.error << summary.failed << " of " << summary.run << " cases failed";
  EXPECT_EQ(summary.run, static_cast<int64_t>(count));
  for (size_t i = 0; i < std::min<size_t>(summary.failures.size(), 20); ++i) {
    const CaseResult& failure = summary.failures[i];
    ADD_FAILURE() << failure.name << "\n  " << failure.message << "\n  alone: " << failure.rerun;
  }
  EXPECT_LE(summary.worst, 1.0) << summary.worst_case;
}

// The configurations of models/models.json.
inline std::vector<ConfigText> OurModels() {
  std::vector<ConfigText> models;
  const Status status = ReadConfigs(ROPEWALK_MODELS_DIR "/models.json", &models);
  EXPECT_TRUE(status.ok()) << status.text();
  return models;
}
// That of one; "" if there is none of this name.
inline std::string OurModel(const std::string& name) {
  for (const ConfigText& model : OurModels()) {
    if (model.name == name) return model.json;
  }
  return "";
}

inline void Report(const std::string& line) {
  std::printf("%s\n", line.c_str());
  const char* path = std::getenv("ROPEWALK_TEST_COUNTS");
  if (FILE* file = path ? std::fopen(path, "a") : nullptr) {
    std::fputs((line + "\n").c_str(), file);
    std::fclose(file);
  }
}

// That the gradients of the cases pass on the backend in hand, and that both of its kernels have run; `kernel`: how the
// counters call those of the backend, "cuda".
inline void ExpectGradientsPass(const std::vector<RopeCase>& cases, DeviceMemory& memory, const char* kernel,
                                const std::string& what) {
  EXPECT_GT(cases.size(), 0u);
  double worst = 0;
  int64_t failed = 0;
  for (const RopeCase& c : cases) {
    const CaseResult result = RunBackwardCase(c, memory);
    worst = std::max(worst, result.worst);
    if (result.passed) continue;
    ADD_FAILURE() << c.name << ": " << result.message;
    if (++failed == 5) return;
  }
  EXPECT_LE(worst, 1.0);
  const std::string counters = ropewalk_counters();
  for (const std::string& name : {Text("\"", kernel, " backward"), Text("\"", kernel, " backward sums\"")})
    EXPECT_NE(counters.find(name), std::string::npos) << name;
  Report(Text(cases.size(), " gradients on ", what, ", the worst ", worst, " of its tolerance"));
}

}  // namespace ropewalk
