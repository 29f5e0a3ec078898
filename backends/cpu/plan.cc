// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/plan.h"

#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

// Below 32 KB a part is done before another thread has woken.
constexpr int64_t kPartBytes = 32 * 1024;

int64_t RowBytes(const RopeCall& call) {
  const rope_params& p = call.params;
  const int64_t heads = int64_t{p.q_heads} + p.k_heads;
  return std::max<int64_t>(1, heads * p.head_dim * RopeDtypeBytes(call.variant.dtype));
}

}  // namespace

RopeCpuPlan PlanRopeCpu(const RopeCall& call) {
  RopeCpuPlan plan;
  plan.rows = call.params.batch * call.params.tokens;
  plan.grain = std::max<int64_t>(1, kPartBytes / RowBytes(call));
  plan.one_part = plan.rows < 2 * plan.grain;
  return plan;
}

RopeCpuBackwardPlan PlanRopeCpuBackward(const RopeBackwardCall& call) {
  const RopeCpuPlan plan = PlanRopeCpu(call.turn);
  RopeCpuBackwardPlan backward;
  const int64_t weights = (call.q_weight_grad ? 1 : 0) + (call.k_weight_grad ? 1 : 0);
  if (weights == 0 || plan.rows == 0) return backward;
  constexpr int64_t kMost = RopeCpuBackwardPlan::kMostChunks;
  backward.chunk_rows = std::max(plan.grain, plan.rows / kMost + (plan.rows % kMost != 0));
  backward.chunks = (plan.rows - 1) / backward.chunk_rows + 1;
  backward.chunk_sums = weights * 2 * call.turn.params.head_dim;
  return backward;
}

std::string RopeCpuPlanFault(const RopeCall& call, const RopeCpuPlan& plan, int threads) {
  const rope_params& p = call.params;
  if (plan.rows != p.batch * p.tokens) {
    return Text("rows must be ", p.batch, " x ", p.tokens, ", but are ", plan.rows);
  }
  const int64_t least = std::max<int64_t>(1, kPartBytes / RowBytes(call));
  if (plan.grain < least) return Text("a part must have at least ", least, " rows, but may have ", plan.grain);
  const int64_t parts = plan.one_part ? 1 : RowParts(plan.rows, plan.grain, threads);
  if (parts < 1 || parts > std::max(threads, 1)) return Text(parts, " parts are for ", threads, " threads");
  int64_t next = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const RowRange part = RowPart({0, plan.rows}, i, parts);
    if (part.begin != next) {
      return Text("row ", std::min(part.begin, next), part.begin > next ? " is in no part" : " is in two parts");
    }
    if (part.end < part.begin) return Text("part ", i, " ends at row ", part.end, ", before its begin at ", part.begin);
    if (parts > 1 && part.end - part.begin < plan.grain) {
      return Text("part ", i, " of ", parts, " has ", part.end - part.begin, " rows, but ", plan.grain,
                  " are the fewest");
    }
    next = part.end;
  }
  if (next != plan.rows)
    return Text("row ", std::min(next, plan.rows), next < plan.rows ? " is in no part" : " is none");
  return "";
}

}  // namespace ropewalk
