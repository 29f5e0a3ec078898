// A case ready to run, for tests that look closer than the runner does.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "conformance/case_call.h"

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

}  // namespace ropewalk
