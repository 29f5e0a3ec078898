// What a test expects of a run over cases.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/text.h"
#include "conformance/backward.h"
#include "conformance/runner.h"
#include "tests/report.h"

namespace ropewalk {

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
