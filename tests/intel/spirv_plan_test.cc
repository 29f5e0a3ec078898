// Plans of the SPIR-V kernel over the space of calls, not over a list: each must hold what the kernel takes for granted
// (RopeSpirvPlanFault), and one that is broken by hand must be found out.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "backends/spirv/plan.h"
#include "base/text.h"
#include "tests/plan_space.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

SpirvDevice DrawDevice(PlanDraw& draw) {
  constexpr int kThreads[] = {0, 1, 2, 16, 63, 64, 128, 448, 512, 1024, 3584};
  constexpr int kLocal[] = {16, 32, 48, 128, 256, 512, 1024};
  return {.threads = draw.Of(kThreads),
          .max_local = draw.Of(kLocal),
          .register_bytes = draw.OneIn(2) ? 64 : 32,
          .general = draw.OneIn(4)};
}

// From 1 to 16,384; half of them where the number of sub-groups for a token changes, one below, at or above.
int64_t DrawTokens(PlanDraw& draw, const SpirvDevice& device, int heads) {
  if (draw.OneIn(2)) return draw.From(1, draw.OneIn(2) ? 64 : 16384);
  const int64_t shares = draw.From(1, std::max(1, std::min(heads, 1 << draw.From(0, 9))));
  return std::clamp<int64_t>(2 * std::max(device.threads, 1) / shares + draw.From(-1, 1), 1, 16384);
}

std::string Describe(const RopeCall& call, const SpirvDevice& device, const RopeSpirvPlan& plan) {
  const rope_params& p = call.params;
  return Text(RopeSpirvName(plan.key), ", heads ", p.q_heads, "/", p.k_heads, ", head_dim ", p.head_dim,
              ", rotary_dim ", p.rotary_dim, " at ", p.rotary_offset, ", ", p.batch, " x ", p.tokens,
              " tokens, a device of ", device.threads, " threads, work-groups of ", device.max_local, ", registers of ",
              device.register_bytes);
}

// What of the space was met, so that a test over too little of it fails.
struct Met {
  int64_t plans = 0;
  std::set<int> lanes, units, fixed, vectors, heads_at_once, sub_groups;
  std::set<bool> wide, spread, rest, only;

  void Add(const RopeCall& call, const RopeSpirvPlan& plan) {
    ++plans;
    lanes.insert(plan.shape.lanes);
    units.insert(plan.key.constants[kRopeSpecUnits]);
    fixed.insert(plan.key.constants[kRopeSpecLanes]);
    vectors.insert(plan.key.dtype * 16 + plan.key.vector);
    heads_at_once.insert(plan.shape.heads_at_once);
    sub_groups.insert(plan.shape.sub_groups);
    wide.insert(plan.shape.choices[kRopeSpecTableVector] != 0);
    spread.insert(plan.groups[1] > 1);
    rest.insert(plan.shape.rest > 0);
    only.insert(call.variant.store_k == kRopeStoreOnly);
  }
  void ExpectMuch() const {
    EXPECT_EQ(lanes.size(), 16u);
    EXPECT_EQ(units, (std::set<int>{0, 1, 2, 4}));
    EXPECT_EQ(fixed, (std::set<int>{0, 4, 8, 16}));
    EXPECT_EQ(vectors.size(), 3u + 4u + 4u);
    EXPECT_EQ(heads_at_once, (std::set<int>{1, 2, 3, 4, 5, 8, 16}));
    EXPECT_GE(sub_groups.size(), 8u);
    for (const auto* both : {&wide, &spread, &rest, &only}) EXPECT_EQ(both->size(), 2u);
  }
};

// False once something is wrong.
bool Holds(const RopeCall& call, const SpirvDevice& device, Met* met) {
  RopeSpirvPlan plan;
  const Status status = PlanRopeSpirv(call, device, &plan);
  const std::string fault = status.ok() ? RopeSpirvPlanFault(call, device, plan) : status.text();
  EXPECT_EQ(fault, "") << Describe(call, device, plan);
  met->Add(call, plan);
  return fault.empty();
}

TEST(SpirvPlan, HoldsForEveryNumberOfHeads) {
  PlanDraw draw(1);
  Met met;
  ForEveryNumberOfHeads(draw, kPlansOfEach, [&](int q_heads, int k_heads) {
    const SpirvDevice device = DrawDevice(draw);
    const int64_t tokens = DrawTokens(draw, device, q_heads + 2 * k_heads);
    return Holds(DrawCall(draw, q_heads, k_heads, DrawPart(draw), tokens), device, &met);
  });
  if (HasFailure()) return;
  met.ExpectMuch();
  EXPECT_GE(met.plans, 2000 * kPlansOfEach);
  Report(Text(met.plans, " SPIR-V plans for 1 to 256 heads hold"));
}

TEST(SpirvPlan, HoldsForEveryPartOfEveryHead) {
  PlanDraw draw(2);
  Met met;
  for (int head_dim = 2; head_dim <= 512; head_dim += 2) {
    for (int rotary_dim = 2; rotary_dim <= head_dim; rotary_dim += 2) {
      const int rest = head_dim - rotary_dim;
      for (const int offset : {0, rest, static_cast<int>(draw.From(0, rest)), rest / 16 * 8}) {
        for (int i = 0; i < (kPlansOfEach + 124) / 125; ++i) {
          const SpirvDevice device = DrawDevice(draw);
          const int q_heads = static_cast<int>(draw.From(1, 12)), k_heads = static_cast<int>(draw.From(0, 4));
          const PlanPart part = {head_dim, rotary_dim, offset};
          if (!Holds(DrawCall(draw, q_heads, k_heads, part, draw.From(1, 200)), device, &met)) return;
        }
      }
    }
  }
  EXPECT_GE(met.plans, 100'000);
  Report(Text(met.plans, " SPIR-V plans for every part of heads up to 512 hold"));
}

TEST(SpirvPlan, HoldsAtTheLimits) {
  PlanDraw draw(3);
  Met met;
  for (int i = 0; i < 300; ++i) {
    if (!Holds(DrawCallAtTheLimits(draw), DrawDevice(draw), &met)) return;
  }
}

TEST(SpirvPlan, NoWorkIsNoPlan) {
  PlanDraw draw(4);
  const SpirvDevice device = DrawDevice(draw);
  RopeCall call = DrawCall(draw, 4, 2, {64, 64, 0}, 3);
  RopeSpirvPlan plan;
  ASSERT_TRUE(PlanRopeSpirv(call, device, &plan).ok());
  EXPECT_EQ(RopeSpirvPlanFault(call, device, plan), "");
  EXPECT_NE(RopeSpirvPlanFault(call, device, {}), "");
  call.params.tokens = 0;
  EXPECT_EQ(RopeSpirvPlanFault(call, device, {}), "");
  EXPECT_NE(RopeSpirvPlanFault(call, device, plan), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Plans that lie

struct Lie {
  std::string name;
  std::function<void(RopeSpirvPlan*)> tell;
  std::function<bool(const RopeCall&, const RopeSpirvPlan&)> matters = [](const RopeCall&, const RopeSpirvPlan&) {
    return true;
  };
};

bool Stores(const RopeCall& call, const RopeSpirvPlan&) { return call.variant.cache_dtype != kRopeNoDtype; }

std::vector<Lie> Lies() {
  std::vector<Lie> lies;
  for (size_t i = 0; i < 3; ++i) {
    lies.push_back({Text("one work-group more in dimension ", i), [i](auto* plan) { ++plan->groups[i]; }});
    lies.push_back({Text("one work-group less in dimension ", i), [i](auto* plan) { --plan->groups[i]; }});
  }
  lies.push_back({"a sub-group more", [](auto* plan) { plan->local += ROPE_SUB_GROUP; }});
  lies.push_back({"half a sub-group more", [](auto* plan) { plan->local += ROPE_SUB_GROUP / 2; }});
  lies.push_back({"a work-group that does not fit", [](auto* plan) {
                    plan->local *= 128;
                    plan->shape.sub_groups *= 128;
                    plan->shape.step *= 128;
                  }});
  // Every number of the shape, one off.
  constexpr size_t kFirst = offsetof(rope_spirv_shape, page_shift), kSize = sizeof(rw_i32);
  for (size_t at = kFirst; at < offsetof(rope_spirv_shape, choices); at += kSize) {
    if (at == offsetof(rope_spirv_shape, lane_multiplier)) continue;  // below
    for (const int by : {-1, 1}) {
      const auto change = [at, by](RopeSpirvPlan* plan) {
        char* const word = reinterpret_cast<char*>(&plan->shape) + at;
        rw_u32 value;  // which goes round
        std::memcpy(&value, word, sizeof(value));
        value += static_cast<rw_u32>(by);
        std::memcpy(word, &value, sizeof(value));
      };
      Lie lie{Text("the word at ", at, " of the shape by ", by), change};
      if (at == offsetof(rope_spirv_shape, page_shift)) lie.matters = Stores;
      lies.push_back(std::move(lie));
    }
  }
  for (int i = 0; i < int{kRopeSpecUnits}; ++i) {
    Lie lie{Text("another choice ", i), [i](auto* plan) { plan->shape.choices[i] ^= 1; }};
    if (i == kRopeSpecTableVector) {
      lie.matters = [](const RopeCall& call, const RopeSpirvPlan& plan) {  // 1 for 0 is a lie, 0 for 1 is slow
        return plan.key.constants[kRopeSpecTableVector] != kRopeSpecArgument || call.variant.axes;
      };
    }
    lies.push_back(std::move(lie));
  }
  lies.push_back({"a page_multiplier too small", [](auto* plan) { --plan->shape.page_multiplier; }, Stores});
  lies.push_back({"a page_multiplier too large",
                  [](auto* plan) { plan->shape.page_multiplier += plan->shape.page_multiplier >> 20; }, Stores});
  lies.push_back({"a lane_multiplier too small", [](auto* plan) { plan->shape.lane_multiplier -= 1; },
                  [](const RopeCall&, const RopeSpirvPlan& plan) { return plan.shape.lanes < 9; }});
  lies.push_back({"a lane_multiplier too large", [](auto* plan) { plan->shape.lane_multiplier += 6000; }});
  // The kernel's constants.
  lies.push_back({"another dtype", [](auto* plan) { plan->key.dtype = plan->key.dtype % 3 + 1; }});
  lies.push_back({"wider accesses", [](auto* plan) { plan->key.vector *= 2; }});
  lies.push_back({"narrower accesses", [](auto* plan) { plan->key.vector /= 2; }});
  for (size_t i = 0; i < kRopeSpecUnits; ++i) {
    if (i == kRopeSpecTableVector) continue;
    lies.push_back({Text("another constant ", i), [i](auto* plan) { plan->key.constants[i] ^= 1; }});
  }
  lies.push_back({"a table read by vectors",
                  [](auto* plan) {
                    if (plan->key.constants[kRopeSpecTableVector] != kRopeSpecArgument)
                      plan->key.constants[kRopeSpecTableVector] = 1;
                    plan->shape.choices[kRopeSpecTableVector] = 1;
                  },
                  [](const RopeCall& call, const RopeSpirvPlan&) {
                    return call.variant.table_dtype == kRopeNoDtype || call.params.cos_pair != 1 || call.variant.axes;
                  }});
  lies.push_back({"more units than registers", [](auto* plan) { plan->key.constants[kRopeSpecUnits] = 8; }});
  lies.push_back({"fewer units than there are", [](auto* plan) { plan->key.constants[kRopeSpecUnits] = 1; },
                  [](const RopeCall&, const RopeSpirvPlan& plan) { return plan.shape.units > plan.shape.lanes; }});
  lies.push_back({"other constant lanes", [](auto* plan) {
                    uint8_t& lanes = plan->key.constants[kRopeSpecLanes];
                    lanes = lanes == 8 || plan->shape.lanes == 8 ? 4 : 8;
                  }});
  lies.push_back({"constant lanes where some units are missing",
                  [](auto* plan) { plan->key.constants[kRopeSpecLanes] = static_cast<uint8_t>(plan->shape.lanes); },
                  [](const RopeCall&, const RopeSpirvPlan& plan) {
                    return plan.shape.lanes * plan.key.constants[kRopeSpecUnits] != plan.shape.units;
                  }});
  // Lanes that agree with one another, but leave units out.
  lies.push_back({"half the lanes",
                  [](auto* plan) {
                    rope_spirv_shape& s = plan->shape;
                    s.lanes /= 2;
                    s.lane_multiplier = (65536 + s.lanes - 1) / s.lanes;
                    s.heads_at_once = ROPE_SUB_GROUP / s.lanes;
                    s.step = static_cast<int>(plan->groups[1]) * s.sub_groups * s.heads_at_once;
                  },
                  [](const RopeCall&, const RopeSpirvPlan& plan) {
                    const int each = plan.key.constants[kRopeSpecUnits];
                    return plan.shape.lanes > 1 && each && plan.shape.lanes / 2 * each < plan.shape.units;
                  }});
  return lies;
}

TEST(SpirvPlan, EveryLieIsFoundOut) {
  PlanDraw draw(5);
  std::map<std::string, int> told;
  const std::vector<Lie> lies = Lies();
  for (int i = 0; i < 3000; ++i) {
    const SpirvDevice device = DrawDevice(draw);
    const int q_heads = static_cast<int>(draw.From(1, 64)), k_heads = static_cast<int>(draw.From(0, 16));
    const RopeCall call =
        DrawCall(draw, q_heads, k_heads, DrawPart(draw), DrawTokens(draw, device, q_heads + 2 * k_heads));
    RopeSpirvPlan plan;
    ASSERT_TRUE(PlanRopeSpirv(call, device, &plan).ok());
    for (const Lie& lie : lies) {
      if (!lie.matters(call, plan)) continue;
      RopeSpirvPlan lying = plan;
      lie.tell(&lying);
      const std::string fault = RopeSpirvPlanFault(call, device, lying);
      ASSERT_GE(fault.size(), 15u) << lie.name << ": " << fault << "\n" << Describe(call, device, plan);
      ++told[lie.name];
    }
  }
  for (const Lie& lie : lies) EXPECT_GE(told[lie.name], 100) << lie.name;
}

// A plan serves its own call alone.
TEST(SpirvPlan, APlanOfAnotherCallIsFoundOut) {
  const std::pair<const char*, std::function<void(RopeCall*)>> changes[] = {
      {"a token more", [](RopeCall* call) { ++call->params.tokens; }},
      {"a token less", [](RopeCall* call) { --call->params.tokens; }},
      {"a head of q more", [](RopeCall* call) { ++call->params.q_heads; }},
      {"a head of q less", [](RopeCall* call) { --call->params.q_heads; }},
      {"a head of k more", [](RopeCall* call) { ++call->params.k_heads; }},
      {"no k", [](RopeCall* call) { call->tensors.k = nullptr; }},
      {"a larger head", [](RopeCall* call) { call->params.head_dim += 2; }},
      {"a smaller rotated part", [](RopeCall* call) { call->params.rotary_dim -= 2; }},
      {"a rotated part that begins elsewhere", [](RopeCall* call) { ++call->params.rotary_offset; }},
      {"another pairing", [](RopeCall* call) { call->variant.pairing ^= 1; }},
      {"q at an odd address", [](RopeCall* call) { call->tensors.q = static_cast<char*>(call->tensors.q) + 1; }},
      {"an odd stride of k", [](RopeCall* call) { call->params.k.token ^= 1; }},
      {"other pages", [](RopeCall* call) { call->params.page_size *= 3; }}};
  PlanDraw draw(6);
  for (int i = 0; i < 3000; ++i) {
    const SpirvDevice device = DrawDevice(draw);
    const RopeCall call = DrawCall(draw, static_cast<int>(draw.From(2, 64)), static_cast<int>(draw.From(1, 16)),
                                   DrawPart(draw), draw.From(2, 300));
    RopeSpirvPlan plan;
    ASSERT_TRUE(PlanRopeSpirv(call, device, &plan).ok());
    for (const auto& [name, change] : changes) {
      const std::string_view what = name;
      if (what == "an odd stride of k" && plan.key.vector == 1) continue;
      if (what == "other pages" && (!Stores(call, plan) || call.params.page_size > 1 << 20)) continue;
      RopeCall other = call;
      change(&other);
      EXPECT_NE(RopeSpirvPlanFault(other, device, plan), "") << name << "\n" << Describe(call, device, plan);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient

// That of such a call: with a norm, without stores, x laid out like dY.
RopeBackwardCall DrawBackward(PlanDraw& draw, RopeCall call) {
  call.variant.norm = 1;
  call.variant.store_v = call.variant.cache_dtype = call.variant.slots_dtype = kRopeNoDtype;
  call.variant.store_k = kRopeNoStore;
  RopeTensors& t = call.tensors;
  t.v = t.slots = nullptr;
  t.k_cache = t.v_cache = nullptr;
  t.k_scale = t.v_scale = nullptr;
  if (t.k && !t.k_out) {
    t.k_out = t.k;
    call.params.k_out = call.params.k;
  }
  RopeBackwardCall backward;
  backward.turn = call;
  const auto x_of = [&](uintptr_t at) {
    const auto off = draw.OneIn(12) ? static_cast<uintptr_t>(RopeDtypeBytes(call.variant.dtype)) << draw.From(0, 4) : 0;
    return reinterpret_cast<const void*>((uintptr_t{1} << 52) + (at << 44) + off);
  };
  backward.q = x_of(0);
  backward.q_strides = call.params.q;
  if (t.k) {
    backward.k = x_of(1);
    backward.k_strides = call.params.k;
  }
  static float sums[2];
  if (call.variant.weight != kRopeNoWeight) {
    if (!draw.OneIn(3)) backward.q_weight_grad = &sums[0];
    if (t.k && !draw.OneIn(3)) backward.k_weight_grad = &sums[1];
  }
  return backward;
}
RopeBackwardCall DrawBackward(PlanDraw& draw, const SpirvDevice& device) {
  const int q_heads = static_cast<int>(draw.From(1, draw.OneIn(4) ? 256 : 64)),
            k_heads = static_cast<int>(draw.From(0, 16));
  return DrawBackward(draw,
                      DrawCall(draw, q_heads, k_heads, DrawPart(draw), DrawTokens(draw, device, q_heads + k_heads)));
}

TEST(SpirvBackwardPlan, Holds) {
  PlanDraw draw(8);
  std::set<int> vectors, units, lanes, sub_groups;
  std::set<bool> makes_sums, rest;
  constexpr int kPlans = kPlansOfEach * 20;
  for (int i = 0; i < kPlans; ++i) {
    const SpirvDevice device = DrawDevice(draw);
    const RopeBackwardCall call = DrawBackward(draw, device);
    RopeSpirvBackwardPlan plan;
    const Status status = PlanRopeSpirvBackward(call, device, &plan);
    const std::string fault = status.ok() ? RopeSpirvBackwardPlanFault(call, device, plan) : status.text();
    ASSERT_EQ(fault, "") << Describe(call.turn, device, plan.rows);
    // There is a module for it, where this build has any.
    if (!RopeSpirvModules().empty()) {
      ASSERT_NE(RopeSpirvModuleOf(plan.rows.key), nullptr) << RopeSpirvName(plan.rows.key);
    }
    // Sums are small beside what is read for them: 16 heads for a set, unless there is but one sub-group of each kind.
    const rope_params& p = call.turn.params;
    const int64_t heads = p.batch * p.tokens * (p.q_heads + (call.turn.tensors.k ? p.k_heads : 0));
    const int64_t sets = plan.workspace / (2 * p.head_dim);
    const int64_t group = int64_t{plan.rows.shape.sub_groups} * plan.rows.shape.heads_at_once;
    ASSERT_LE(sets, std::max(2 * heads / 16, group) + 2 * group) << Describe(call.turn, device, plan.rows);
    vectors.insert(plan.rows.key.dtype * 16 + plan.rows.key.vector);
    units.insert(plan.rows.key.constants[kRopeSpecUnits]);
    lanes.insert(plan.rows.shape.lanes);
    sub_groups.insert(plan.rows.shape.sub_groups);
    makes_sums.insert(!plan.sums.empty());
    rest.insert(plan.rows.shape.rest > 0);
  }
  EXPECT_EQ(vectors.size(), 2u + 3u + 3u);
  EXPECT_EQ(units, (std::set<int>{0, 1}));
  EXPECT_EQ(lanes.size(), 16u);
  EXPECT_EQ(sub_groups.size(), 8u);
  for (const auto* both : {&makes_sums, &rest}) EXPECT_EQ(both->size(), 2u);
  Report(Text(kPlans, " SPIR-V plans of gradients hold"));
}

TEST(SpirvBackwardPlan, NoTokens) {
  PlanDraw draw(9);
  const SpirvDevice device = DrawDevice(draw);
  RopeBackwardCall call = DrawBackward(draw, DrawCall(draw, 4, 2, {64, 64, 0}, 3));
  static float sum;
  call.q_weight_grad = &sum;
  call.turn.params.tokens = 0;
  RopeSpirvBackwardPlan plan;
  ASSERT_TRUE(PlanRopeSpirvBackward(call, device, &plan).ok());
  EXPECT_TRUE(plan.rows.empty());
  EXPECT_FALSE(plan.sums.empty());  // the sum of nothing
  EXPECT_EQ(plan.workspace, 0);
  EXPECT_EQ(RopeSpirvBackwardPlanFault(call, device, plan), "");
  call.turn.params.tokens = int64_t{1} << 31;
  EXPECT_EQ(PlanRopeSpirvBackward(call, device, &plan).text(),
            Text("rope: q_grad must have fewer than 2^31 tokens on a GPU, but has ",
                 call.turn.params.batch * call.turn.params.tokens));
}

TEST(SpirvBackwardPlan, EveryLieIsFoundOut) {
  using Plan = RopeSpirvBackwardPlan;
  const std::pair<const char*, std::function<void(Plan*)>> lies[] = {
      {"a work-group of q more", [](Plan* plan) { ++plan->q_groups; }},
      {"a work-group of q less", [](Plan* plan) { --plan->q_groups; }},
      {"a work-group of k more", [](Plan* plan) { ++plan->k_groups; }},
      {"a work-group of k less", [](Plan* plan) { --plan->k_groups; }},
      {"a work-group more", [](Plan* plan) { ++plan->rows.groups[0]; }},
      {"a second dimension", [](Plan* plan) { ++plan->rows.groups[1]; }},
      {"a sub-group more", [](Plan* plan) { plan->rows.local += ROPE_SUB_GROUP; }},
      {"another number of sub-groups", [](Plan* plan) { ++plan->rows.shape.sub_groups; }},
      {"another step", [](Plan* plan) { ++plan->rows.shape.step; }},
      {"more heads at once", [](Plan* plan) { ++plan->rows.shape.heads_at_once; }},
      {"another number of lanes", [](Plan* plan) { ++plan->rows.shape.lanes; }},
      {"another sine", [](Plan* plan) { plan->rows.shape.sine_flip ^= 0x80000000u; }},
      {"a smaller workspace", [](Plan* plan) { --plan->workspace; }},
      {"sums where none are wanted, or none", [](Plan* plan) { plan->rows.shape.choices[kRopeSpecSums] ^= 1; }},
      {"the kernel of the operation", [](Plan* plan) { plan->rows.key.entry = kSpirvRope; }},
      {"wider accesses", [](Plan* plan) { plan->rows.key.vector *= 2; }},
      {"another dtype", [](Plan* plan) { plan->rows.key.dtype = plan->rows.key.dtype % 3 + 1; }},
      {"a work-group of sums more", [](Plan* plan) { ++plan->sums.groups[0]; }},
      {"a weight more", [](Plan* plan) { ++plan->sums.groups[1]; }},
      {"half a row of work-items more", [](Plan* plan) { plan->sums.local += ROPE_SUMS_ELEMENTS / 2; }},
      {"too many work-items for sums", [](Plan* plan) { plan->sums.local = 2 * ROPE_SUMS_MOST_ITEMS; }},
      {"another kernel for sums", [](Plan* plan) { plan->sums_key.entry = kSpirvBackward; }}};
  PlanDraw draw(10);
  std::map<std::string, int> told;
  for (int i = 0; i < 3000; ++i) {
    const SpirvDevice device = DrawDevice(draw);
    const RopeBackwardCall call = DrawBackward(draw, device);
    RopeSpirvBackwardPlan plan;
    ASSERT_TRUE(PlanRopeSpirvBackward(call, device, &plan).ok());
    for (const auto& [name, tell] : lies) {
      RopeSpirvBackwardPlan lying = plan;
      tell(&lying);
      // What there is none of may be said as one likes.
      const bool of_sums = std::string_view(name).find("sums") != std::string_view::npos;
      if (plan.sums.empty() && (of_sums || lying.sums.groups[1] || lying.sums.local) && lying.sums.empty()) continue;
      if (plan.sums.empty() && of_sums && lying.sums_key.entry != plan.sums_key.entry) continue;
      ASSERT_GE(RopeSpirvBackwardPlanFault(call, device, lying).size(), 10u) << name << "\n"
                                                                             << Describe(call.turn, device, plan.rows);
      ++told[name];
    }
  }
  for (const auto& [name, tell] : lies) EXPECT_GE(told[name], 100) << name;
}

}  // namespace
}  // namespace ropewalk
