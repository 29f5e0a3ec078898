// The CUDA variants that the conformance cases need, and what ptxas says of one: for tests/cuda/cuda_compile_test.cc
// and scripts/cuda_report.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "backends/cuda/plan.h"
#include "conformance/variants.h"

namespace ropewalk {

using CudaVariant = Variant<RopeCudaKey>;

// Those of the cases as they are, with one token and with many, and in both layouts, on a device of this architecture.
// The variants of one source text are one variant.
inline Status CudaVariantsOf(const std::vector<RopeCase>& cases, const CudaDevice& device,
                             std::vector<CudaVariant>* out) {
  std::unordered_set<std::string> known;
  return ForEachCall(cases, [&](const RopeCase& c, RopeCall* call) -> Status {
    const int64_t tokens = call->params.tokens;
    constexpr auto kAny = RopeCudaLayout::kAny;
    const std::pair<int64_t, RopeCudaLayout> sizes[] = {{tokens, kAny},
                                                        {1, kAny},
                                                        {300, kAny},
                                                        {700, kAny},
                                                        {2500, kAny},
                                                        {16384, kAny},
                                                        {tokens, RopeCudaLayout::kFew},
                                                        {tokens, RopeCudaLayout::kMany}};
    for (const auto& [count, layout] : sizes) {
      call->params.tokens = tokens == 0 ? 0 : count;
      RopeCudaPlan plan;
      ROPEWALK_TRY(PlanRopeCuda(*call, device, {.dependent_launch = true, .layout = layout}, &plan));
      if (plan.grid_x && known.insert(RopeCudaSource(plan.key)).second) out->push_back({c.name, plan.key});
    }
    return {};
  });
}

// As few as hold every pair of choices: sizes count by what the code does with them, not by their values.
inline std::vector<CudaVariant> CoveringVariants(const std::vector<CudaVariant>& all) {
  return Covering(all, [](const RopeCudaKey& key) {
    uint8_t bytes[sizeof(RopeVariant)];
    std::memcpy(bytes, &key.variant, sizeof(bytes));
    std::vector<int> choices(bytes, bytes + sizeof(bytes));
    choices.insert(choices.end(), {key.vector, (key.lanes & (key.lanes - 1)) == 0, key.in_flight, key.few_tokens,
                                   key.table_vector, key.rotary_dim != key.head_dim, key.rotary_offset != 0,
                                   key.head_dim % 16 == 0, key.flat, BlockTokens(ShapeOf(ChoicesOf(key)).grid) > 1,
                                   WarpTokens(ShapeOf(ChoicesOf(key)).grid) > 1, key.full, key.alike, key.min_blocks});
    return choices;
  });
}

struct PtxasText {
  int registers = 0;
  int shared_bytes = 0;
  int spilled_bytes = 0;  // stores and loads of all functions
  int stack_bytes = 0;
  std::string warnings;  // all that is not ptxas's report
};

// Reads the log of a verbose compilation.
inline PtxasText ReadPtxas(std::string_view log) {
  PtxasText out;
  const auto before = [](std::string_view line, std::string_view words) {
    const size_t at = line.find(words);
    if (at == std::string_view::npos) return 0;
    const size_t digits = line.find_last_not_of("0123456789", at - 2) + 1;
    return std::atoi(std::string(line.substr(digits, at - digits)).c_str());
  };
  for (size_t at = 0; at < log.size();) {
    const size_t end = std::min(log.find('\n', at), log.size());
    const std::string_view line = log.substr(at, end - at);
    at = end + 1;
    if (line.starts_with("ptxas info") || line.starts_with("ptxas    ")) {
      out.registers += before(line, " registers");
      out.shared_bytes += before(line, " bytes smem");
      out.spilled_bytes += before(line, " bytes spill stores") + before(line, " bytes spill loads");
      out.stack_bytes += before(line, " bytes stack frame");
    } else if (!line.empty()) {
      out.warnings.append(line).append("\n");
    }
  }
  return out;
}

}  // namespace ropewalk
