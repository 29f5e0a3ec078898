// SPDX-License-Identifier: Apache-2.0
#include "conformance/backward.h"

#include <memory>
#include <string>

#include "base/text.h"
#include "conformance/case_call.h"

namespace ropewalk {

std::vector<RopeCase> BackwardCases(size_t step) {
  std::vector<RopeCase> cases;
  size_t i = 0;
  for (const RopeCase& c : RopeCases()) {
    if (c.cache == Cache::kNone && i++ % step == 0) cases.push_back(c);
  }
  return cases;
}

std::vector<RopeCase> RandomBackwardCases(uint64_t seed, int64_t count) {
  std::vector<RopeCase> cases = RandomRopeCases(seed, count);
  int64_t i = 0;
  for (RopeCase& c : cases) {
    c.cache = Cache::kNone;
    c.k_store_only = false;
    c.scale = Scale::kNone;
    if (c.bad == Bad::kSlot || c.bad == Bad::kPaddedPosition) c.bad = Bad::kNone;
    if (++i % 4 != 0 && !c.norm) {
      c.norm = true;
      c.weight = i % 3 == 0 ? Weight::kNone : i % 3 == 1 ? Weight::kPlain : Weight::kZeroCentered;
      c.weight_dtype = i % 2 == 0 ? c.dtype : static_cast<uint32_t>(kF32);
    }
  }
  return cases;
}

namespace {

Status Run(const RopeCase& c, DeviceMemory& memory, CaseResult* result) {
  std::unique_ptr<CaseCall> call;
  ROPEWALK_TRY(CaseCall::MakeBackward(c, memory, &call));
  ROPEWALK_TRY(call->Run());
  ROPEWALK_TRY(call->Reset());
  ROPEWALK_TRY(call->Run());
  ROPEWALK_TRY(call->Verify(&result->message, &result->worst, &result->elements));
  const bool fault = ropewalk_check_faults() != ROPEWALK_OK;
  const std::string text = fault ? ropewalk_last_error() : "", &wanted = call->expected_fault();
  if (result->message.empty() && (fault == wanted.empty() || text.find(wanted) == std::string::npos))
    result->message = Text("the fault is \"", text, "\", want \"", wanted, "\"");
  return {};
}

}  // namespace

CaseResult RunBackwardCase(const RopeCase& c, DeviceMemory& memory) {
  CaseResult result;
  result.name = c.name;
  const Status status = Run(c, memory, &result);
  if (!status.ok()) {
    result.message = status.text();
    (void)ropewalk_check_faults();  // the next case starts clean
  }
  result.passed = result.message.empty();
  return result;
}

}  // namespace ropewalk
