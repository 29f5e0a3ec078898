// Plans of the CUDA kernel over the space of calls, not over a list: each must be true of its call (CheckRopeCudaPlan),
// whatever shape is asked for, and one that is broken by hand must be found out.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "backends/cuda/plan.h"
#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "tests/plan_space.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

CudaDevice DrawDevice(PlanDraw& draw) {
  constexpr CudaDevice kDevices[] = {{132, 9, 0, true},   {132, 9, 0, true},   {132, 9, 0, false},
                                     {108, 8, 0, false},  {84, 8, 6, false},   {142, 8, 9, false},
                                     {148, 10, 0, false}, {188, 12, 0, false}, {1, 8, 7, false}};
  return draw.Of(kDevices);
}

// From 1 to 16,384; half of them beside a number at which a rule or the layout changes.
int64_t DrawTokens(PlanDraw& draw, const CudaDevice& device, int64_t row_bytes) {
  constexpr int64_t kSteps[] = {1, 2, 8, 32, 768, 1024, 1536, 3072, 4096};
  if (draw.OneIn(2)) return draw.From(1, draw.OneIn(2) ? 64 : 16384);
  if (draw.OneIn(2)) return std::max<int64_t>(1, draw.Of(kSteps) + draw.From(-1, 1));
  // Bytes of a multiprocessor.
  constexpr int64_t kBytes[] = {512, 2560, 2896, 6144, 24 * 1024, 128 * 1024};
  const int64_t tokens = draw.Of(kBytes) * device.sm_count / std::max<int64_t>(row_bytes, 1);
  return std::clamp<int64_t>(tokens + draw.From(-1, 1), 1, 16384);
}

RopeCudaShape DrawShape(PlanDraw& draw) {
  constexpr uint8_t kVectors[] = {0, 1, 2, 3, 4, 6, 8, 10, 12, 16};
  constexpr uint8_t kTokens[] = {1, 1, 2, 3, 4, 8, 16, 32, 255};
  RopeCudaShape shape;
  if (draw.OneIn(16)) {  // as a file may have it
    for (uint8_t* field : {&shape.few, &shape.vector, &shape.in_flight, &shape.flat, &shape.cut, &shape.warp_tokens,
                           &shape.tokens, &shape.resident, &shape.share, &shape.start}) {
      *field = static_cast<uint8_t>(draw.From(0, draw.OneIn(2) ? 4 : 255));
    }
    return shape;
  }
  shape.few = draw.OneIn(2);
  shape.vector = draw.Of(kVectors);
  shape.in_flight = static_cast<uint8_t>(draw.From(0, draw.OneIn(8) ? 255 : 8));
  shape.flat = draw.OneIn(2) ? uint8_t{0} : static_cast<uint8_t>(draw.From(1, draw.OneIn(8) ? 255 : 3));
  shape.cut = static_cast<uint8_t>(draw.From(0, draw.OneIn(8) ? 255 : 16));
  shape.warp_tokens = draw.OneIn(2)   ? uint8_t{1}
                      : draw.OneIn(2) ? static_cast<uint8_t>(1u << draw.From(0, 5))
                                      : static_cast<uint8_t>(draw.From(0, 255));
  shape.tokens = draw.Of(kTokens);
  shape.resident = static_cast<uint8_t>(draw.From(0, 64));
  shape.share = draw.OneIn(2) ? uint8_t{1} : static_cast<uint8_t>(draw.From(0, 6));
  shape.start = static_cast<uint8_t>(draw.From(0, 3));
  return shape;
}

std::string Describe(const RopeCall& call, const CudaDevice& device) {
  const rope_params& p = call.params;
  return Text("heads ", p.q_heads, "/", p.k_heads, ", head_dim ", p.head_dim, ", rotary_dim ", p.rotary_dim, " at ",
              p.rotary_offset, ", v_dim ", p.v_dim, ", ", p.batch, " x ", p.tokens, " tokens, ", device.sm_count,
              " multiprocessors");
}

// What of the space was met, so that a test over too little of it fails.
struct Met {
  int64_t plans = 0, refused = 0;
  std::set<int> vectors, lanes, units, layouts, block_tokens, warp_tokens, rounds;
  std::set<bool> full, alike, packed_v, only;

  void Add(const RopeCall& call, const RopeCudaKey& key) {
    const rope_shape shape = ShapeOf(ChoicesOf(key));
    ++plans;
    vectors.insert(key.vector);
    lanes.insert(key.lanes);
    units.insert(shape.units_per_lane);
    layouts.insert(key.few_tokens ? 0 : shape.flat ? 1 : shape.staged ? 2 : 3);
    block_tokens.insert(BlockTokens(shape.grid));
    warp_tokens.insert(WarpTokens(shape.grid));
    rounds.insert(shape.grid.rounds);
    if (key.few_tokens) full.insert(key.full != 0);
    if (key.few_tokens) alike.insert(key.alike != 0);
    packed_v.insert(key.packed == 2);
    only.insert(call.variant.store_k == kRopeStoreOnly);
  }
  void ExpectMuch() const {
    EXPECT_EQ(vectors, (std::set<int>{1, 2, 4, 6, 8, 10, 12}));
    EXPECT_EQ(lanes.size(), 32u);
    EXPECT_GE(units.size(), 6u);
    EXPECT_EQ(layouts.size(), 4u);
    EXPECT_GE(block_tokens.size(), 20u);
    EXPECT_GE(warp_tokens.size(), 4u);
    EXPECT_GE(rounds.size(), 6u);
    for (const auto* both : {&full, &alike, &packed_v, &only}) EXPECT_EQ(both->size(), 2u);
  }
};

// The plans that are chosen, those of each layout, and one of any shape. False once something is wrong.
bool Hold(const RopeCall& call, const CudaDevice& device, PlanDraw& draw, Met* met) {
  const RopeCudaShape shape = DrawShape(draw);
  const bool dependent = draw.OneIn(2);
  const RopeCudaOptions all[] = {{dependent, RopeCudaLayout::kAny, nullptr},
                                 {dependent, RopeCudaLayout::kFew, nullptr},
                                 {dependent, RopeCudaLayout::kMany, nullptr},
                                 {dependent, RopeCudaLayout::kAny, &shape}};
  for (const RopeCudaOptions& options : all) {
    RopeCudaPlan plan;
    Status status = PlanRopeCuda(call, device, options, &plan);
    if (status.ok()) status = CheckRopeCudaPlan(call, device, plan);
    EXPECT_TRUE(status.ok()) << status.text() << "\n" << Describe(call, device);
    if (!status.ok()) return false;
    met->Add(call, plan.key);
  }
  return true;
}

TEST(CudaPlan, HoldsForEveryNumberOfHeads) {
  PlanDraw draw(1);
  Met met;
  ForEveryNumberOfHeads(draw, kPlansOfEach + kPlansOfEach / 20, [&](int q_heads, int k_heads) {
    const CudaDevice device = DrawDevice(draw);
    const PlanPart part = DrawPart(draw);
    const int64_t tokens = DrawTokens(draw, device, int64_t{q_heads + k_heads} * part.head_dim * 2);
    return Hold(DrawCall(draw, q_heads, k_heads, part, tokens), device, draw, &met);
  });
  if (HasFailure()) return;
  met.ExpectMuch();
  EXPECT_GE(met.plans, int64_t{10'000} * kPlansOfEach);
  Report(Text(met.plans, " CUDA plans for 1 to 256 heads hold"));
}

// Of the table of calls that were searched, as it is written.
struct Row {
  uint16_t tokens;
  uint8_t head, rotary, q_heads, k_heads, stages;
  RopeCudaShape shape;
};
constexpr Row kRows[] = {
#include "backends/cuda/shapes_table.inc"
};

TEST(CudaPlan, TheTableServesItsCalls) {
  const CudaDevice device = {132, 9, 0, true};
  for (const Row& row : kRows) {
    RopeCall call = {};
    call.variant.dtype = kRopeBF16;
    call.variant.norm = row.stages & 1;
    call.variant.table_dtype = row.stages & 2 ? kRopeF32 : kRopeNoDtype;
    const int store = row.stages / 4;  // StoreKind
    call.variant.store_v = store > 0;
    call.variant.store_k = store > 2 ? kRopeStoreOnly : store ? kRopeStore : kRopeNoStore;
    call.variant.cache_dtype = !store ? kRopeNoDtype : store % 2 ? kRopeBF16 : kRopeE4M3;
    call.tensors.k = &call;
    rope_params& p = call.params;
    p.batch = 1;
    p.tokens = row.tokens;
    p.head_dim = p.v_dim = 4 * row.head;
    p.rotary_dim = 4 * row.rotary;
    p.q_heads = row.q_heads;
    p.k_heads = row.k_heads;
    RopeCudaOrigin origin;
    const RopeCudaShape shape = ChooseRopeCudaShape(call, device, RopeCudaLayout::kAny, &origin);
    ASSERT_EQ(origin, RopeCudaOrigin::kTable) << row.tokens << " tokens, " << 4 * row.head;
    ASSERT_EQ(shape.numbers(), row.shape.numbers()) << row.tokens << " tokens, " << 4 * row.head;
    p.rotary_offset = 8;  // another call
    ChooseRopeCudaShape(call, device, RopeCudaLayout::kAny, &origin);
    ASSERT_NE(origin, RopeCudaOrigin::kTable);
  }
}

TEST(CudaPlan, HoldsAtTheLimits) {
  PlanDraw draw(3);
  Met met;
  for (int i = 0; i < 300; ++i) {
    if (!Hold(DrawCallAtTheLimits(draw), DrawDevice(draw), draw, &met)) return;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is broken is found.

struct Broken {
  const char* name;
  std::function<void(RopeCudaPlan*)> by;
  const char* told;
  bool few = true;
  bool store = false;
};

void PrintTo(const Broken& broken, std::ostream* out) { *out << broken.name; }

class CudaPlanBroken : public testing::TestWithParam<Broken> {};

TEST_P(CudaPlanBroken, IsFound) {
  const Broken& broken = GetParam();
  const CudaDevice device = {132, 9, 0, true};
  int found = 0;
  PlanDraw draw(7);
  for (int i = 0; i < 4000 && found < 20; ++i) {
    const RopeCall call = DrawCall(draw, 40, 8, {128, 128, 0}, draw.From(2, 64));
    if (broken.store != (call.variant.cache_dtype != kRopeNoDtype)) continue;
    RopeCudaPlan plan;
    const RopeCudaLayout layout = broken.few ? RopeCudaLayout::kFew : RopeCudaLayout::kMany;
    ASSERT_TRUE(PlanRopeCuda(call, device, {.dependent_launch = true, .layout = layout}, &plan).ok());
    ASSERT_TRUE(CheckRopeCudaPlan(call, device, plan).ok());
    const RopeCudaPlan before = plan;
    broken.by(&plan);
    if (plan.key == before.key && plan.grid_x == before.grid_x && plan.grid_y == before.grid_y &&
        plan.at_once == before.at_once) {
      continue;
    }
    const Status status = CheckRopeCudaPlan(call, device, plan);
    EXPECT_FALSE(status.ok()) << RopeCudaName(plan.key);
    if (status.ok()) return;
    if (status.text().find(broken.told) != std::string::npos) ++found;
  }
  EXPECT_GE(found, 20) << "it is to say: " << broken.told;
}

// The first is what gave heads of v to a block that had none of its own.
INSTANTIATE_TEST_SUITE_P(
    , CudaPlanBroken,
    testing::Values(
        Broken{"ABlockMore", [](RopeCudaPlan* p) { ++p->grid_y; }, "has a block without a head"},
        Broken{"ABlockLess", [](RopeCudaPlan* p) { p->grid_y -= p->grid_y > 1; }, "leaves heads without a block"},
        Broken{"ATokenMore", [](RopeCudaPlan* p) { ++p->grid_x; }, "has a block without a token"},
        Broken{"ATokenLess", [](RopeCudaPlan* p) { p->grid_x -= p->grid_x > 1; }, "too few blocks for the tokens"},
        Broken{"FullThatIsNot", [](RopeCudaPlan* p) { p->key.full = 1; }, "every group has a head"},
        Broken{"AlikeThatIsNot",
               [](RopeCudaPlan* p) {
                 if (!p->key.alike) p->key.alike = 1;
               },
               "of one tensor"},
        Broken{"MoreWarps", [](RopeCudaPlan* p) { p->key.threads = static_cast<uint16_t>(p->key.threads + 32); },
               "left over", false},
        Broken{"OtherTeams", [](RopeCudaPlan* p) { p->key.token_groups = 3; }, "left over", false},
        Broken{"OtherHeads", [](RopeCudaPlan* p) { p->key.q_heads = p->key.q_heads ? 41 : 0; }, "numbers of heads"},
        Broken{"OtherStride", [](RopeCudaPlan* p) { p->key.q_token += p->key.q_token ? 8 : 0; },
               "other strides than q"},
        Broken{"NotPacked", [](RopeCudaPlan* p) { p->key.packed = p->key.packed ? p->key.packed : 1; },
               "q's neighbour"},
        Broken{"WiderVectors", [](RopeCudaPlan* p) { p->key.vector = 32; }, "has vectors"},
        Broken{"NoLanes", [](RopeCudaPlan* p) { p->key.lanes = 0; }, "no vectors, lanes"},
        Broken{"TooManyStages",
               [](RopeCudaPlan* p) {
                 if (p->key.vector >= 4) p->key.in_flight = 200;
               },
               "shared memory", false},
        Broken{"TooManyBlocks", [](RopeCudaPlan* p) { p->key.min_blocks = 33; }, "more blocks than a multiprocessor"},
        Broken{"NotAtOnce", [](RopeCudaPlan* p) { p->at_once = p->grid_x * p->grid_y > 132; }, "blocks run at once"},
        Broken{"OtherPages", [](RopeCudaPlan* p) { p->key.page_shift = 31; }, "pages of another size", true, true},
        Broken{"OtherCache", [](RopeCudaPlan* p) { p->key.cache_token += p->key.cache_head ? 8 : 0; },
               "other strides than a cache", true, true},
        Broken{"OtherDims", [](RopeCudaPlan* p) { p->key.head_dim = 64; }, "other heads"},
        Broken{"OtherVariant", [](RopeCudaPlan* p) { p->key.variant.inverse ^= 1; }, "another variant"}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace ropewalk
