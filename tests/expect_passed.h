// What a test expects of a run over cases.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>

#include "conformance/runner.h"

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

}  // namespace ropewalk
