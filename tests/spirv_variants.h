// The SPIR-V variants that the conformance cases need: for tests/level_zero_test.cc and scripts/intel_report.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "conformance/case_call.h"
#include "ops/rope/rope_spirv.h"

namespace ropewalk {

struct SpirvVariant {
  std::string of;  // a case that needs it
  RopeSpirvKey key;
};

// Those of the cases, each once.
inline Status SpirvVariantsOf(const std::vector<RopeCase>& cases, const SpirvDevice& device,
                              std::vector<SpirvVariant>* out) {
  std::set<std::string> known;
  for (const RopeCase& c : cases) {
    std::unique_ptr<CaseCall> call;
    ROPEWALK_TRY(CaseCall::Make(c, HostMemory(), &call));
    RopeCall lowered;
    if (!LowerRope(call->args(), nullptr, &lowered).ok()) continue;  // a case that is to be refused
    RopeSpirvPlan plan;
    ROPEWALK_TRY(PlanRopeSpirv(lowered, device, &plan));
    if (!plan.empty() && known.insert(RopeSpirvName(plan.key)).second) out->push_back({c.name, plan.key});
  }
  return {};
}

// As few as hold every pair of choices that meet in some variant, found one by one.
inline std::vector<SpirvVariant> CoveringSpirvVariants(const std::vector<SpirvVariant>& all) {
  std::set<std::tuple<size_t, int, size_t, int>> met;
  std::vector<SpirvVariant> chosen;
  for (const SpirvVariant& variant : all) {
    std::vector<int> choices(variant.key.constants.begin(), variant.key.constants.end());
    choices.insert(choices.end(), {variant.key.dtype, variant.key.vector});
    bool is_new = false;
    for (size_t i = 0; i < choices.size(); ++i) {
      for (size_t j = 0; j < i; ++j) is_new |= met.emplace(i, choices[i], j, choices[j]).second;
    }
    if (is_new) chosen.push_back(variant);
  }
  return chosen;
}

}  // namespace ropewalk
