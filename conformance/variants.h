// Variants of kernels that the conformance cases need, whatever the backend, and work on many of them at once; then
// those of the CUDA kernel, with what ptxas says of one, and of the SPIR-V kernel. For the tests that compile them and
// for scripts/cuda_report.cc and scripts/intel_report.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "backends/cuda/plan.h"
#include "backends/spirv/plan.h"
#include "conformance/case_call.h"
#include "rope/call.h"

namespace ropewalk {

template <class Key>
struct Variant {
  std::string of;  // a case that needs it
  Key key;
};

// `visit(case, &call)` for each case that is not to be refused; its call may be changed.
template <class Visit>
Status ForEachCall(const std::vector<RopeCase>& cases, const Visit& visit) {
  for (const RopeCase& c : cases) {
    std::unique_ptr<CaseCall> made;
    ROPEWALK_TRY(CaseCall::Make(c, HostMemory(), &made));
    RopeCall call;
    if (LowerRope(made->args(), nullptr, &call).ok()) ROPEWALK_TRY(visit(c, &call));
  }
  return {};
}

// Some that hold every pair of choices that meet in some variant, found one by one. `choices_of(key)`: integers, as
// many for each key.
template <class Key, class ChoicesOf>
std::vector<Variant<Key>> Covering(const std::vector<Variant<Key>>& all, const ChoicesOf& choices_of) {
  std::set<std::tuple<size_t, int, size_t, int>> met;
  std::vector<Variant<Key>> chosen;
  for (const Variant<Key>& variant : all) {
    const std::vector<int> choices = choices_of(variant.key);
    bool is_new = false;
    for (size_t i = 0; i < choices.size(); ++i) {
      for (size_t j = 0; j < i; ++j) is_new |= met.emplace(i, choices[i], j, choices[j]).second;
    }
    if (is_new) chosen.push_back(variant);
  }
  return chosen;
}

// The same, but about a third as many: always the one with the most pairs that no other has yet.
template <class Key, class ChoicesOf>
std::vector<Variant<Key>> FewCovering(const std::vector<Variant<Key>>& all, const ChoicesOf& choices_of) {
  std::map<std::tuple<size_t, int, size_t, int>, size_t> numbers;
  std::vector<std::vector<size_t>> pairs_of;
  for (const Variant<Key>& variant : all) {
    const std::vector<int> choices = choices_of(variant.key);
    std::vector<size_t>& pairs = pairs_of.emplace_back();
    for (size_t i = 0; i < choices.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        pairs.push_back(numbers.try_emplace({i, choices[i], j, choices[j]}, numbers.size()).first->second);
      }
    }
  }
  std::vector<bool> met(numbers.size());
  std::vector<Variant<Key>> chosen;
  for (;;) {
    size_t best = 0;
    long most = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const long count = std::ranges::count_if(pairs_of[i], [&](size_t pair) { return !met[pair]; });
      if (count > most) best = i, most = count;
    }
    if (most == 0) return chosen;
    for (const size_t pair : pairs_of[best]) met[pair] = true;
    chosen.push_back(all[best]);
  }
}

// `work(next)` on as many threads as there are processors; next() gives each number below `count` to one of them, and
// then `count` for ever.
template <class Work>
void OnAllThreads(size_t count, const Work& work) {
  std::atomic<size_t> taken{0};
  const auto next = [&] { return std::min(taken++, count); };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] { work(next); });
  }
  work(next);
  for (std::thread& thread : threads) thread.join();
}

// ---- CUDA -----------------------------------------------------------------------------------------------------------

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

// ---- SPIR-V ---------------------------------------------------------------------------------------------------------

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
