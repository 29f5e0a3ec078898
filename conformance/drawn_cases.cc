// Cases that no list holds: drawn from all that a case can say, what engines send, those of the gradient.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iterator>
#include <span>

#include "base/text.h"
#include "conformance/case_list.h"
#include "conformance/models.h"

namespace ropewalk {

RopeCase DrawnCase(Draw& draw) {
  constexpr Angles kAnyAngles[] = {Angles::kFrequencies, Angles::kFrequencies, Angles::kFrequencies,
                                   Angles::kTable,       Angles::kPacked,      Angles::kFullWidth,
                                   Angles::kRepeated,    Angles::kTransposed,  Angles::kPerBatch};
  constexpr Weight kAnyWeight[] = {Weight::kNone, Weight::kPlain, Weight::kZeroCentered};
  constexpr Positions kAnyPositions[] = {Positions::kNone, Positions::kArange, Positions::kRandom, Positions::kListed};
  constexpr Axes kAnyAxes[] = {Axes::kSections, Axes::kInterleaved, Axes::kTwo};
  constexpr Cache kAnyCache[] = {Cache::kFlat, Cache::kNhd, Cache::kHnd};
  constexpr Scale kAnyScale[] = {Scale::kNone, Scale::kHost, Scale::kTensor, Scale::kPerHead};
  constexpr Slots kAnySlots[] = {Slots::kAll, Slots::kSkips};
  constexpr uint32_t kInt[] = {kI32, kI64};
  constexpr uint32_t kAnyCacheDtype[] = {0, kE4M3, kE5M2};
  constexpr uint32_t kAnyWeightDtype[] = {0, kF32, kF16, kBF16};
  constexpr int64_t kHeadDims[] = {8, 24, 32, 64, 72, 80, 96, 100, 128, 128, 160, 192, 256};
  constexpr int64_t kHeads[] = {1, 2, 3, 4, 7};
  constexpr int64_t kFewTokens[] = {1, 2, 3, 5, 8, 17};
  constexpr int64_t kPageSizes[] = {1, 3, 4, 16, 24};
  RopeCase c;
  c.dtype = draw.Of(kDtypes);
  c.pairing = draw.Of(kPairings);
  c.batch = draw.OneIn(3) ? 2 : 0;
  c.tokens = draw.Of(kFewTokens);
  c.q_heads = draw.Of(kHeads);
  c.k_heads = draw.OneIn(6) ? 0 : draw.Of(kHeads);
  c.head_dim = draw.Of(kHeadDims);
  if (draw.OneIn(3)) c.rotary_dim = 2 * draw.From(1, c.head_dim / 2);
  if (c.rotary_dim && draw.OneIn(2)) c.rotary_offset = draw.From(0, c.head_dim - c.rotary_dim);
  c.layout = draw.Of(kLayouts);
  c.out_of_place = draw.OneIn(3);
  c.inverse = draw.OneIn(5);
  c.rounding = draw.OneIn(3) ? ROPEWALK_ROUND_REFERENCE : ROPEWALK_ROUND_FUSED;
  c.norm = draw.OneIn(2);
  if (c.norm) {
    c.weight = draw.Of(kAnyWeight);
    c.weight_dtype = draw.Of(kAnyWeightDtype);
  }
  c.angles = draw.Of(kAnyAngles);
  c.table_dtype = draw.Of(kDtypes);
  c.positions = draw.Of(kAnyPositions);
  c.positions_dtype = draw.Of(kInt);
  c.positions_broadcast = draw.OneIn(2);
  if (draw.OneIn(4)) c.offsets_dtype = draw.Of(kInt);
  if (draw.OneIn(5)) {
    c.axes = draw.Of(kAnyAxes);
    c.axes_dtype = draw.OneIn(2) ? static_cast<uint32_t>(kI32) : 0;
  }
  if (draw.OneIn(2)) {
    c.cache = draw.Of(kAnyCache);
    c.cache_dtype = draw.Of(kAnyCacheDtype);
    if (c.cache_dtype) c.scale = draw.Of(kAnyScale);
    c.page_size = c.cache == Cache::kFlat ? 16 : draw.Of(kPageSizes);
    c.slots = draw.Of(kAnySlots);
    c.slots_dtype = draw.Of(kInt);
    c.store_v = !draw.OneIn(4);
    if (draw.OneIn(3)) c.v_dim = draw.Of(kHeadDims);
  }
  return c;
}

namespace {

// Beyond what the lists hold: any even head size and part of it, more heads and tokens, any data, faults.
RopeCase DrawnWide(Draw& draw) {
  constexpr int64_t kWideTokens[] = {1, 4, 6, 7, 33, 79, 80, 300, 800, 1100, 1536, 2500, 3100};
  constexpr Data kAnyData[] = {Data::kLarge, Data::kTiny, Data::kNonFinite, Data::kMixed};
  constexpr Bad kAnyBad[] = {Bad::kPosition, Bad::kSlot, Bad::kAxis, Bad::kPaddedPosition};
  constexpr double kThetas[] = {1e4, 5e5, 1e6};
  RopeCase c = DrawnCase(draw);
  if (draw.OneIn(2)) {
    const int64_t unit = draw.OneIn(2) ? 2 : 16;
    c.head_dim = unit * draw.From(1, 320 / unit);
    c.rotary_dim = draw.OneIn(3) ? 2 * draw.From(1, c.head_dim / 2) : c.head_dim;
    const int64_t rest = c.head_dim - c.rotary_dim;
    c.rotary_offset = draw.OneIn(2) ? 0 : draw.OneIn(2) ? rest : draw.From(0, rest);
  }
  if (draw.OneIn(3)) c.q_heads = draw.From(1, 40);
  if (c.k_heads && draw.OneIn(3)) c.k_heads = draw.From(1, 12);
  if (draw.OneIn(3)) c.tokens = draw.Of(kWideTokens);
  if (c.tokens > 300) {
    c.batch = 0;
    c.q_heads = std::min<int64_t>(c.q_heads, 6);
  }
  if (c.v_dim && draw.OneIn(2)) c.v_dim = 2 * draw.From(1, 160);
  if (draw.OneIn(3)) c.data = draw.Of(kAnyData);
  if (c.cache != Cache::kNone && draw.OneIn(6)) c.store_k = false;
  if (draw.OneIn(8)) c.slots = Slots::kNothing;
  if (draw.OneIn(8)) c.bad = draw.Of(kAnyBad);
  c.theta = draw.Of(kThetas);
  c.k_store_only = c.cache != Cache::kNone && c.store_k && draw.OneIn(4);
  return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// What engines send

// One of the ways in which engines call.
struct Mode {
  bool norm = false;
  bool other_pairing = false;
  Layout layout = Layout::kPacked;
  bool v_behind = false, padded = false, batched = false, out_of_place = false;
  Angles angles = Angles::kFrequencies;
  uint32_t dtype = kBF16, table_dtype = kF32;
  Cache cache = Cache::kNone;
  uint32_t cache_dtype = 0;
  Scale scale = Scale::kNone;
  int64_t page_size = 16;
  bool k_store_only = false;
  Slots slots = Slots::kAll;
};
constexpr Mode kModes[] = {
    {.v_behind = true},
    {.norm = true, .cache = Cache::kNhd},
    {.padded = true, .angles = Angles::kPacked, .table_dtype = kBF16, .cache = Cache::kFlat, .slots = Slots::kSkips},
    {.norm = true, .v_behind = true, .padded = true, .dtype = kF16},
    {.cache = Cache::kHnd, .cache_dtype = kE4M3, .scale = Scale::kHost, .page_size = 64},
    {.norm = true, .layout = Layout::kSeparate, .angles = Angles::kPacked},
    {.other_pairing = true, .layout = Layout::kSeparate, .out_of_place = true},
    {.norm = true,
     .padded = true,
     .angles = Angles::kPacked,
     .cache = Cache::kNhd,
     .cache_dtype = kE5M2,
     .scale = Scale::kPerHead,
     .page_size = 1,
     .slots = Slots::kSkips},
    {.norm = true, .layout = Layout::kTransposed, .batched = true, .angles = Angles::kFullWidth, .table_dtype = kBF16},
    {.v_behind = true, .batched = true, .dtype = kF32},
    {.norm = true, .other_pairing = true, .cache = Cache::kNhd, .page_size = 7},
    {.padded = true, .cache = Cache::kNhd, .k_store_only = true, .slots = Slots::kSkips},
    {.norm = true, .cache = Cache::kHnd, .cache_dtype = kE4M3, .scale = Scale::kTensor, .k_store_only = true},
};

void TakeModel(const ModelHeads& model, RopeCase* c) {
  c->head_dim = model.head_dim;
  c->rotary_dim = model.rotary_dim;
  c->rotary_offset = model.rotary_offset;
  c->pairing = model.pairing;
  c->norm = model.norm != HeadNorm::kNone;
  c->weight = model.norm == HeadNorm::kNone     ? Weight::kNone
              : model.norm == HeadNorm::kWeight ? Weight::kPlain
                                                : Weight::kZeroCentered;
}

RopeCase CallOfModel(const ModelHeads& model, int32_t ranks, const Mode& mode, int64_t tokens) {
  RopeCase c = {.model = ranks == 1 ? Text(model.name) : Text(model.name, "-rank", ranks),
                .dtype = mode.dtype,
                .batch = mode.batched ? 2 : 0,
                .tokens = tokens,
                .layout = mode.layout,
                .row_gap = mode.padded ? model.head_dim : 0,
                .v_behind = mode.v_behind,
                .out_of_place = mode.out_of_place,
                .angles = mode.angles,
                .table_dtype = mode.table_dtype,
                .positions = Positions::kRandom,
                .cache = mode.cache,
                .cache_dtype = mode.cache_dtype,
                .page_size = mode.page_size,
                .k_store_only = mode.k_store_only,
                .scale = mode.scale,
                .slots = mode.slots};
  if (!SplitHeads(model, ranks, &c.q_heads, &c.k_heads)) c.q_heads = 0;
  TakeModel(model, &c);
  if (mode.norm && c.weight == Weight::kNone) c.weight = Weight::kPlain;
  if (mode.other_pairing) c.pairing = ROPEWALK_NEOX + ROPEWALK_INTERLEAVED - c.pairing;
  return c;
}

// As a log-uniform draw gives them, from 1 to 8,192: every order of magnitude alike.
int64_t AnyTokens(Draw& draw) {
  const int64_t most = int64_t{1} << draw.From(0, 13);
  return draw.From(most / 2 + 1, most);
}

// So many elements at most, of which the reference works out 20 million a second: fewer tokens, or few heads.
void Bound(Draw& draw, int64_t most, RopeCase* c) {
  const auto token = [c] { return std::max<int64_t>(c->batch, 1) * (c->q_heads + 2 * c->k_heads) * c->head_dim; };
  if (c->tokens * token() > most && draw.OneIn(2)) {
    c->q_heads = draw.From(1, 4);
    c->k_heads = std::min<int64_t>(c->k_heads, 1);
    c->model.clear();
  }
  c->tokens = std::clamp<int64_t>(most / token(), 1, c->tokens);
}

// A shape as engines have it: the heads of a rank of a real model, or any, and rows as projections leave them. One in
// four is any at all.
RopeCase DrawnShape(Draw& draw) {
  constexpr int32_t kRanks[] = {1, 2, 4, 8};
  constexpr int64_t kGaps[] = {8, 16, 24, 64, 128, 256, 1, 2, 100, 1000};
  constexpr Layout kUsual[] = {Layout::kPacked, Layout::kPacked, Layout::kSeparate};
  constexpr int64_t kMost[] = {1 << 15, 1 << 16, 1 << 17, 1 << 18}, kVeryMost = 1 << 22;
  RopeCase c = DrawnWide(draw);
  if (draw.OneIn(4)) {
    Bound(draw, kVeryMost, &c);
    return c;
  }
  const bool k = c.k_heads != 0;
  if (draw.OneIn(3)) {
    c.q_heads = draw.From(1, 256);
    if (k) c.k_heads = draw.From(1, draw.OneIn(2) ? c.q_heads : std::min<int64_t>(c.q_heads, 16));
  } else {
    const std::span<const ModelHeads> models = AllModelHeads();
    const ModelHeads* model;
    int32_t ranks;
    do {
      model = &models[draw.Next() % models.size()];
      ranks = draw.Of(kRanks);
    } while (!SplitHeads(*model, ranks, &c.q_heads, &c.k_heads));
    c.model = Text(model->name, "-rank", ranks);
    const RopeCase drawn = c;
    TakeModel(*model, &c);
    if (draw.OneIn(4)) c.pairing = drawn.pairing;
    if (draw.OneIn(3)) {
      c.norm = drawn.norm;
      c.weight = drawn.weight;
    }
    if (!k && draw.OneIn(2)) c.k_heads = 0;
  }
  if (draw.OneIn(3)) c.dtype = kBF16;
  c.layout = draw.OneIn(4) || c.k_heads == 0 ? c.layout : draw.Of(kUsual);
  if (draw.OneIn(3)) c.row_gap = draw.Of(kGaps);
  c.v_behind = draw.OneIn(2);
  c.tokens = AnyTokens(draw);
  Bound(draw, c.tokens > 2048 && draw.OneIn(4) ? kVeryMost : draw.Of(kMost), &c);
  return c;
}

// Another call of the shape, with tokens, data and slots of its own.
RopeCase Another(Draw& draw, RopeCase c) {
  constexpr Data kAnyData[] = {Data::kNormal, Data::kNormal, Data::kLarge, Data::kMixed};
  constexpr Slots kAnySlots[] = {Slots::kAll, Slots::kSkips, Slots::kNothing};
  if (c.tokens > 1) c.tokens = draw.From(std::max<int64_t>(2, c.tokens / 2), c.tokens);
  if (c.positions != Positions::kNone) c.positions = draw.OneIn(2) ? Positions::kRandom : Positions::kArange;
  c.data = draw.Of(kAnyData);
  c.slots = draw.Of(kAnySlots);
  c.bad = Bad::kNone;
  return c;
}

}  // namespace

std::vector<RopeCase> RandomRopeCases(uint64_t seed, int64_t count) {
  Draw draw(seed);
  CaseList list;
  while (list.size() < count) {
    const RopeCase shape = DrawnShape(draw);
    list.Add(shape);
    for (int tries = 0; tries < 12 && list.size() < count && list.size() % kCallsOfAShape != 0; ++tries)
      list.Add(Another(draw, shape));
  }
  return list.Take();
}

std::vector<RopeCase> EngineCases(bool all) {
  CaseList list;
  size_t number = 0;
  for (const ModelHeads& model : AllModelHeads()) {
    const size_t own = number++;
    for (const int32_t ranks : {1, 2, 4, 8}) {
      if (ranks > 1 && !all) break;
      for (size_t mode = 0; mode < std::size(kModes); ++mode) {
        if (!all && mode != own % std::size(kModes)) continue;
        for (const int64_t tokens : {1, 7, 33, 64, 200}) {
          const RopeCase c = CallOfModel(model, ranks, kModes[mode], tokens);
          if (c.q_heads) list.Add(c);
        }
      }
    }
  }
  return list.Take();
}

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

}  // namespace ropewalk
