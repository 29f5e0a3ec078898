// The SPIR-V variants that the conformance cases need: for tests/intel/level_zero_test.cc and scripts/intel_report.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <set>
#include <string>
#include <vector>

#include "backends/spirv/backward.h"
#include "backends/spirv/plan.h"
#include "conformance/variants.h"

namespace ropewalk {

using SpirvVariant = Variant<RopeSpirvKey>;

// Those of the cases, each once.
inline Status SpirvVariantsOf(const std::vector<RopeCase>& cases, const SpirvDevice& device,
                              std::vector<SpirvVariant>* out) {
  std::set<std::string> known;
  return ForEachCall(cases, [&](const RopeCase& c, RopeCall* call) -> Status {
    RopeSpirvPlan plan;
    ROPEWALK_TRY(PlanRopeSpirv(*call, device, &plan));
    if (!plan.empty() && known.insert(RopeSpirvName(plan.key)).second) out->push_back({c.name, plan.key});
    return {};
  });
}

// Those of the cases' gradients, each once: of what has a norm.
inline Status SpirvBackwardVariantsOf(const std::vector<RopeCase>& cases, const SpirvDevice& device,
                                      std::vector<SpirvVariant>* out) {
  std::set<std::string> known;
  for (const RopeCase& c : cases) {
    std::unique_ptr<CaseCall> made;
    ROPEWALK_TRY(CaseCall::MakeBackward(c, HostMemory(), &made));
    RopeBackwardCall call;
    ROPEWALK_TRY(LowerRopeBackward(made->args(), made->gradients(), nullptr, &call));
    if (!call.turn.variant.norm) continue;
    RopeSpirvBackwardPlan plan;
    ROPEWALK_TRY(PlanRopeSpirvBackward(call, device, &plan));
    const auto add = [&](const SpirvGrid& grid, const RopeSpirvKey& key) {
      if (!grid.empty() && known.insert(RopeSpirvName(key)).second) out->push_back({c.name, key});
    };
    add(plan.rows, plan.rows.key);
    add(plan.sums, plan.sums_key);
  }
  return {};
}

// As few as hold every pair of choices.
inline std::vector<SpirvVariant> CoveringSpirvVariants(const std::vector<SpirvVariant>& all) {
  return FewCovering(all, [](const RopeSpirvKey& key) {
    std::vector<int> choices(key.constants.begin(), key.constants.end());
    choices.insert(choices.end(), {key.dtype, key.vector, key.entry});
    return choices;
  });
}

}  // namespace ropewalk
