// How the CPU backend shares rows among threads, over the space of calls: each row in one part, each part worth a
// thread; and a plan that is broken by hand is found out.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/plan.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "base/text.h"
#include "tests/plan_space.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

std::string Describe(const RopeCall& call, int threads) {
  const rope_params& p = call.params;
  return Text("heads ", p.q_heads, "/", p.k_heads, " of ", p.head_dim, ", ", p.batch, " x ", p.tokens, " tokens, ",
              threads, " threads");
}

// Half of them where the number of parts changes: one row below, at or above.
int64_t DrawTokens(PlanDraw& draw, int64_t grain, int threads) {
  if (draw.OneIn(2)) return draw.From(1, draw.OneIn(2) ? 64 : 16384);
  return std::clamp<int64_t>(grain * draw.From(1, threads + 1) + draw.From(-1, 1), 1, 16384);
}

TEST(CpuPlan, HoldsForEveryNumberOfHeadsAndThreads) {
  constexpr int kThreads[] = {1, 2, 3, 4, 7, 8, 12, 16, 31, 64, 96, 128, 255};
  PlanDraw draw(11);
  int64_t plans = 0;
  std::set<int64_t> parts;
  ForEveryNumberOfHeads(draw, kPlansOfEach, [&](int q_heads, int k_heads) {
    const int threads = draw.Of(kThreads);
    RopeCall call = DrawCall(draw, q_heads, k_heads, DrawPart(draw), 1);
    call.params.tokens = DrawTokens(draw, PlanRopeCpu(call).grain, threads);
    const RopeCpuPlan plan = PlanRopeCpu(call);
    const std::string fault = RopeCpuPlanFault(call, plan, threads);
    EXPECT_EQ(fault, "") << Describe(call, threads);
    parts.insert(plan.one_part ? 0 : RowParts(plan.rows, plan.grain, threads));
    ++plans;
    return fault.empty();
  });
  if (HasFailure()) return;
  for (const int64_t count : {0, 2, 3, 4, 7, 12, 64, 255}) EXPECT_TRUE(parts.contains(count)) << count;
  Report(Text(plans, " CPU plans for 1 to 256 heads hold"));
}

// Rows whose product with the threads does not fit in 64 bits.
TEST(CpuPlan, HoldsForMoreRowsThanThereAre) {
  PlanDraw draw(12);
  for (int i = 0; i < 2000; ++i) {
    RopeCall call = DrawCall(draw, 1, 0, {2, 2, 0}, 1);
    call.params.batch = 1;
    call.params.tokens = draw.From(int64_t{1} << 54, int64_t{1} << 60);
    const int threads = static_cast<int>(draw.From(1, 1024));
    ASSERT_EQ(RopeCpuPlanFault(call, PlanRopeCpu(call), threads), "") << Describe(call, threads);
  }
}

TEST(CpuPlan, EveryLieIsFoundOut) {
  PlanDraw draw(13);
  for (int i = 0; i < 2000; ++i) {
    const int threads = static_cast<int>(draw.From(2, 64));
    const RopeCall call = DrawCall(draw, 8, 2, {128, 128, 0}, draw.From(1000, 16384));
    const RopeCpuPlan plan = PlanRopeCpu(call);
    for (RopeCpuPlan lie :
         {RopeCpuPlan{plan.rows + 1, plan.grain, plan.one_part}, RopeCpuPlan{plan.rows - 1, plan.grain, plan.one_part},
          RopeCpuPlan{plan.rows, plan.grain - 1, plan.one_part}, RopeCpuPlan{plan.rows, 0, false}}) {
      EXPECT_GE(RopeCpuPlanFault(call, lie, threads).size(), 15u) << Describe(call, threads);
    }
  }
}

}  // namespace
}  // namespace ropewalk
