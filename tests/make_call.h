// A case on the host, ready to run, for tests that look closer than the runner does.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <memory>

#include "conformance/case_call.h"

namespace ropewalk {

inline std::unique_ptr<CaseCall> MakeCall(RopeCase c) {
  c.name = CaseName(c);
  std::unique_ptr<CaseCall> call;
  const Status status = CaseCall::Make(c, HostMemory(), &call);
  EXPECT_TRUE(status.ok()) << status.text();
  return call;
}

}  // namespace ropewalk
