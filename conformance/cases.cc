// SPDX-License-Identifier: Apache-2.0
#include "conformance/cases.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <unordered_set>
#include <utility>

#include "base/text.h"
#include "conformance/draw.h"
#include "conformance/models.h"

namespace ropewalk {
namespace {

const char* ShortName(uint32_t dtype) {
  switch (dtype) {
    case kF32: return "f32";
    case kF16: return "f16";
    case kBF16: return "bf16";
    case kE4M3: return "e4m3";
    case kE5M2: return "e5m2";
    case kI32: return "i32";
    case kI64: return "i64";
    default: return "?";
  }
}

// "yarn" of {"rope_type": "yarn", ..}.
std::string ScalingName(const RopeCase& c) {
  const std::string key = "\"rope_type\": \"";
  const size_t at = c.scaling.find(key);
  if (at == std::string::npos) return c.config.empty() ? "default" : "config";
  const size_t begin = at + key.size();
  return c.scaling.substr(begin, c.scaling.find('"', begin) - begin);
}

template <class Enum>
const char* Entry(std::initializer_list<const char*> names, Enum value) {
  return names.begin()[static_cast<size_t>(value)];
}
const char* Name(Layout layout) {
  return Entry({"separate", "packed", "transposed", "padded", "misaligned", "reversed"}, layout);
}
const char* Name(Angles angles) {
  return Entry({"freq", "table", "cossin", "fullwidth", "repeated", "columns", "batchtable"}, angles);
}
const char* Name(Positions positions) { return Entry({"none", "arange", "random", "listed"}, positions); }
const char* Name(Axes axes) { return Entry({"one", "sections", "interleaved", "two"}, axes); }
const char* Name(Cache cache) { return Entry({"none", "flat", "nhd", "hnd"}, cache); }
const char* Name(Scale scale) { return Entry({"none", "host", "tensor", "heads"}, scale); }
const char* Name(Slots slots) { return Entry({"all", "skips", "nothing"}, slots); }
const char* Name(Data data) { return Entry({"normal", "large", "tiny", "nonfinite", "mixed"}, data); }
const char* Name(Bad bad) { return Entry({"none", "position", "slot", "axis", "padding"}, bad); }
const char* Name(Weight weight) { return Entry({"none", "plain", "zero_centered"}, weight); }

constexpr uint32_t kDtypes[] = {kF32, kF16, kBF16};
constexpr int32_t kPairings[] = {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED};
constexpr int64_t kTokens[] = {0, 1, 2, 5, 17, 64, 257};

constexpr Layout kLayouts[] = {Layout::kSeparate, Layout::kPacked,     Layout::kTransposed,
                               Layout::kPadded,   Layout::kMisaligned, Layout::kReversed};
constexpr Angles kTables[] = {Angles::kTable,    Angles::kPacked,     Angles::kFullWidth,
                              Angles::kRepeated, Angles::kTransposed, Angles::kPerBatch};

struct Rotated {
  int64_t head_dim, rotary_dim, offset;
};
constexpr Rotated kParts[] = {{128, 96, 0},   {128, 64, 0}, {128, 6, 0},  {64, 24, 8},  {192, 64, 128},
                              {576, 64, 512}, {256, 64, 0}, {80, 20, 0},  {96, 72, 0},  {16, 2, 14},
                              {128, 126, 2},  {72, 36, 0},  {128, 34, 5}, {64, 32, 16}, {1024, 40, 3}};

struct Rule {
  const char* json;
  int64_t sequence_length;
};
// For rotary_dim 64: longrope's factors are as many as pairs.
std::string LongRope(int64_t pairs) {
  std::string low, high;
  for (int64_t i = 0; i < pairs; ++i) {
    low += Text(i ? ", " : "", 1.0 + 0.01 * static_cast<double>(i));
    high += Text(i ? ", " : "", 1.0 + 0.75 * static_cast<double>(i));
  }
  return Text("{\"rope_type\": \"longrope\", \"short_factor\": [", low, "], \"long_factor\": [", high,
              "], \"original_max_position_embeddings\": 4096, \"factor\": 32.0}");
}
constexpr Rule kRules[] = {
    {"{\"rope_type\": \"linear\", \"factor\": 8.0}", 0},
    {"{\"rope_type\": \"dynamic\", \"factor\": 4.0, \"original_max_position_embeddings\": 2048}", 8192},
    {"{\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 32768}", 0},
    {"{\"rope_type\": \"yarn\", \"factor\": 40.0, \"original_max_position_embeddings\": 4096, \"beta_fast\": 32, "
     "\"beta_slow\": 1, \"mscale\": 1.0, \"mscale_all_dim\": 0.707, \"truncate\": false}",
     0},
    {"{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
     "\"original_max_position_embeddings\": 8192}",
     0},
    {"{\"rope_type\": \"proportional\", \"partial_rotary_factor\": 0.5, \"factor\": 2.0}", 0},
};

// What an option asks of the others. False: the case has no meaning.
bool Settle(RopeCase* c) {
  if (c->angles != Angles::kFrequencies) {
    if (!c->scaling.empty() || c->positions == Positions::kListed) return false;
    if (c->angles == Angles::kPerBatch && c->batch == 0) return false;
  } else {
    c->table_dtype = 0;
    if (c->axes != Axes::kNone && c->axes_dtype == 0 && !c->scaling.empty()) return false;
  }
  if (c->axes == Axes::kNone) c->axes_dtype = 0;
  if (c->angles != Angles::kFrequencies && c->axes != Axes::kNone) c->axes_dtype = kI32;
  if (c->weight != Weight::kNone) c->norm = true;
  if (c->weight_dtype == 0 && c->weight != Weight::kNone) c->weight_dtype = c->dtype;
  if (c->weight == Weight::kNone) c->weight_dtype = 0;
  if (c->rotary_dim == 0) c->rotary_dim = c->head_dim;
  if (c->rotary_dim + c->rotary_offset > c->head_dim) return false;
  if (c->batch == 0) c->positions_broadcast = false;
  if (c->positions == Positions::kNone) c->positions_broadcast = false;
  if (c->positions == Positions::kListed) c->tokens = 16;
  if (c->cache == Cache::kNone) {
    c->cache_dtype = 0;
    c->scale = Scale::kNone;
    c->v_dim = 0;
    c->slots = Slots::kAll;
    if (c->k_store_only) return false;
    if (c->bad == Bad::kSlot || c->bad == Bad::kPaddedPosition) return false;
  } else {
    if (c->k_heads == 0) return false;
    if (!c->store_k && (!c->store_v || c->k_store_only)) return false;
    if (c->cache_dtype == 0) c->cache_dtype = c->dtype;
    if (c->cache_dtype != c->dtype && !(c->cache_dtype & kFp8)) return false;
    if (!(c->cache_dtype & kFp8) && c->scale != Scale::kNone) return false;
    if (c->v_dim == 0) c->v_dim = c->head_dim;
  }
  if (c->k_heads == 0 && c->layout == Layout::kPacked) return false;
  if (c->layout != Layout::kPacked) c->row_gap = 0;
  if (c->layout != Layout::kPacked || (c->cache != Cache::kNone && c->store_v)) c->v_behind = false;
  if (c->bad != Bad::kNone && c->tokens < 2) return false;
  if ((c->bad == Bad::kPosition || c->bad == Bad::kPaddedPosition) &&
      (c->angles == Angles::kFrequencies || c->positions == Positions::kNone)) {
    return false;
  }
  if (c->bad == Bad::kAxis && (c->axes_dtype == 0 || c->positions == Positions::kNone)) return false;
  return true;
}

class List {
 public:
  void Add(RopeCase c) {
    if (!Settle(&c)) return;
    c.name = CaseName(c);
    if (names_.insert(c.name).second) cases_.push_back(std::move(c));
  }
  int64_t size() const { return static_cast<int64_t>(cases_.size()); }
  std::vector<RopeCase> Take() { return std::move(cases_); }

 private:
  std::vector<RopeCase> cases_;
  std::unordered_set<std::string> names_;
};

template <class Body>
void EachType(Body body) {
  for (const uint32_t dtype : kDtypes) {
    for (const int32_t pairing : kPairings) body(dtype, pairing);
  }
}

void AddHeadDims(List* list) {
  size_t turn = 0;
  for (const int64_t head_dim : {2, 6, 16, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 576, 1024}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool norm : {false, true}) {
        for (const bool table : {false, true}) {
          ++turn;
          list->Add({.dtype = dtype,
                     .batch = turn % 3 == 0 ? 2 : 0,
                     .tokens = turn % 7 == 0 ? 17 : 3,
                     .head_dim = head_dim,
                     .layout = kLayouts[turn % std::size(kLayouts)],
                     .out_of_place = turn % 5 == 0,
                     .pairing = pairing,
                     .norm = norm,
                     .weight = norm ? Weight::kPlain : Weight::kNone,
                     .angles = table ? Angles::kTable : Angles::kFrequencies,
                     .positions = Positions::kRandom});
        }
      }
    });
  }
}

void AddParts(List* list) {
  for (const Rotated& part : kParts) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool norm : {false, true}) {
        for (const bool table : {false, true}) {
          list->Add({.dtype = dtype,
                     .tokens = 4,
                     .head_dim = part.head_dim,
                     .rotary_dim = part.rotary_dim,
                     .rotary_offset = part.offset,
                     .out_of_place = norm != table,
                     .pairing = pairing,
                     .norm = norm,
                     .angles = table ? Angles::kPacked : Angles::kFrequencies,
                     .positions = Positions::kRandom});
        }
      }
    });
  }
}

void AddRules(List* list) {
  constexpr int64_t kRotary = 64;
  std::vector<std::pair<std::string, int64_t>> rules = {{"", 0}};
  for (const Rule& rule : kRules) rules.emplace_back(rule.json, rule.sequence_length);
  rules.emplace_back(LongRope(kRotary / 2), 4096);
  rules.emplace_back(LongRope(kRotary / 2), 8192);
  for (const auto& rule : rules) {
    const std::string& json = rule.first;
    const int64_t sequence_length = rule.second;
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const double theta : {10000.0, 1000000.0}) {
        list->Add({.dtype = dtype,
                   .head_dim = theta > 1e5 ? 96 : kRotary,
                   .rotary_dim = kRotary,
                   .pairing = pairing,
                   .inverse = theta > 1e5,
                   .theta = theta,
                   .scaling = json,
                   .sequence_length = sequence_length,
                   .positions = Positions::kListed,
                   .positions_dtype = theta > 1e5 ? kI32 : kI64,
                   .offsets_dtype = theta > 1e5 ? static_cast<uint32_t>(kI64) : 0});
      }
      list->Add({.dtype = dtype,
                 .tokens = 33,
                 .head_dim = kRotary,
                 .pairing = pairing,
                 .norm = true,
                 .theta = 500000.0,
                 .scaling = json,
                 .sequence_length = sequence_length,
                 .positions = Positions::kRandom});
    });
  }
}

void AddTables(List* list) {
  for (const Angles angles : kTables) {
    for (const uint32_t table_dtype : kDtypes) {
      EachType([&](uint32_t dtype, int32_t pairing) {
        for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
          list->Add({.dtype = dtype,
                     .batch = angles == Angles::kPerBatch ? 3 : 0,
                     .head_dim = 64,
                     .rotary_dim = rounding == ROPEWALK_ROUND_FUSED ? 64 : 48,
                     .pairing = pairing,
                     .inverse = angles == Angles::kRepeated,
                     .rounding = rounding,
                     .angles = angles,
                     .table_dtype = table_dtype,
                     .positions = Positions::kRandom});
        }
      });
    }
  }
}

void AddNorms(List* list) {
  for (const Weight weight : {Weight::kNone, Weight::kPlain, Weight::kZeroCentered}) {
    for (const uint32_t weight_dtype : kDtypes) {
      EachType([&](uint32_t dtype, int32_t pairing) {
        for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
          for (const Angles angles : {Angles::kFrequencies, Angles::kTable}) {
            list->Add({.dtype = dtype,
                       .tokens = 7,
                       .head_dim = 96,
                       .rotary_dim = weight == Weight::kPlain ? 96 : 64,
                       .pairing = pairing,
                       .rounding = rounding,
                       .norm = true,
                       .weight = weight,
                       .weight_dtype = weight_dtype,
                       .eps = weight == Weight::kNone ? 1e-5 : 1e-6,
                       .angles = angles,
                       .table_dtype = dtype,
                       .positions = Positions::kRandom});
          }
        }
      });
    }
  }
}

void AddLayouts(List* list) {
  for (const Layout layout : kLayouts) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool out_of_place : {false, true}) {
        for (const int64_t batch : {0, 2}) {
          for (const bool norm : {false, true}) {
            list->Add({.dtype = dtype,
                       .batch = batch,
                       .tokens = 6,
                       .q_heads = batch ? 1 : 5,
                       .k_heads = 1,
                       .head_dim = batch ? 128 : 80,
                       .layout = layout,
                       .out_of_place = out_of_place,
                       .pairing = pairing,
                       .norm = norm,
                       .weight = norm ? Weight::kPlain : Weight::kNone,
                       .positions = batch ? Positions::kArange : Positions::kNone,
                       .positions_broadcast = batch != 0});
          }
        }
      }
    });
  }
}

void AddTokens(List* list) {
  for (const int64_t tokens : kTokens) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool norm : {false, true}) {
        list->Add({.dtype = dtype,
                   .tokens = tokens,
                   .head_dim = 64,
                   .pairing = pairing,
                   .norm = norm,
                   .positions = Positions::kNone});
        list->Add({.dtype = dtype,
                   .tokens = tokens,
                   .k_heads = norm ? 2 : 0,
                   .head_dim = 64,
                   .pairing = pairing,
                   .angles = Angles::kTable,
                   .offsets_dtype = norm ? kI32 : kI64});
      }
    });
  }
}

void AddStores(List* list) {
  for (const Cache cache : {Cache::kFlat, Cache::kNhd, Cache::kHnd}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      const bool neox = pairing == ROPEWALK_NEOX;
      for (const int64_t page_size : {16, 7, 1}) {
        if (cache == Cache::kFlat && page_size != 16) continue;
        list->Add({.dtype = dtype,
                   .tokens = 23,
                   .head_dim = page_size == 7 ? 80 : 128,
                   .rotary_dim = page_size == 7 ? 60 : 128,
                   .layout = neox ? Layout::kPacked : Layout::kSeparate,
                   .out_of_place = page_size == 1,
                   .pairing = pairing,
                   .norm = neox,
                   .cache = cache,
                   .page_size = page_size,
                   .v_dim = page_size == 16 ? 0 : 72,
                   .slots = page_size == 16 ? Slots::kAll : Slots::kSkips,
                   .slots_dtype = neox ? kI32 : kI64});
      }
      for (const uint32_t cache_dtype : {kE4M3, kE5M2}) {
        for (const Scale scale : {Scale::kNone, Scale::kHost, Scale::kTensor, Scale::kPerHead}) {
          for (const int32_t rounding : {ROPEWALK_ROUND_FUSED, ROPEWALK_ROUND_REFERENCE}) {
            const bool fused = rounding == ROPEWALK_ROUND_FUSED;
            list->Add({.dtype = dtype,
                       .tokens = 9,
                       .head_dim = 64,
                       .rotary_dim = fused ? 64 : 32,
                       .pairing = pairing,
                       .rounding = rounding,
                       .norm = fused == neox,
                       .angles = fused ? Angles::kFrequencies : Angles::kTable,
                       .cache = cache,
                       .cache_dtype = cache_dtype,
                       .scale = scale,
                       .slots = Slots::kSkips});
          }
        }
      }
      list->Add({.dtype = dtype, .pairing = pairing, .cache = cache, .store_v = false, .slots = Slots::kNothing});
      list->Add({.dtype = dtype, .pairing = pairing, .cache = cache, .store_v = false, .slots = Slots::kSkips});
      list->Add({.dtype = dtype, .pairing = pairing, .cache = cache, .store_k = false, .slots = Slots::kSkips});
      list->Add({.dtype = dtype,
                 .batch = 2,
                 .tokens = 6,
                 .layout = Layout::kTransposed,
                 .pairing = pairing,
                 .cache = cache,
                 .page_size = 5});
      list->Add({.dtype = dtype, .data = Data::kLarge, .pairing = pairing, .cache = cache, .cache_dtype = kE4M3});
    });
  }
}

void AddAxes(List* list) {
  for (const Axes axes : {Axes::kSections, Axes::kInterleaved, Axes::kTwo}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const Angles angles : {Angles::kFrequencies, Angles::kTable, Angles::kPacked}) {
        for (const uint32_t axes_dtype : {0u, static_cast<uint32_t>(kI32)}) {
          for (const int64_t batch : {0, 2}) {
            list->Add({.dtype = dtype,
                       .batch = batch,
                       .tokens = 6,
                       .head_dim = batch ? 128 : 80,
                       .pairing = pairing,
                       .norm = batch != 0,
                       .angles = angles,
                       .positions = axes == Axes::kTwo ? Positions::kArange : Positions::kRandom,
                       .positions_dtype = batch ? kI32 : kI64,
                       .positions_broadcast = axes == Axes::kTwo,
                       .offsets_dtype = axes == Axes::kInterleaved ? static_cast<uint32_t>(kI32) : 0,
                       .axes = axes,
                       .axes_dtype = axes_dtype});
          }
        }
      }
      // Positions without a row for each axis serve all axes.
      list->Add({.dtype = dtype, .pairing = pairing, .positions = Positions::kNone, .axes = axes, .axes_dtype = kI32});
      list->Add({.dtype = dtype, .pairing = pairing, .positions = Positions::kNone, .axes = axes});
    });
  }
}

void AddBad(List* list) {
  for (const Bad bad : {Bad::kPosition, Bad::kSlot, Bad::kAxis, Bad::kPaddedPosition}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool out_of_place : {false, true}) {
        for (const bool stored : {false, true}) {
          list->Add({.dtype = dtype,
                     .batch = stored ? 0 : 2,
                     .tokens = 8,
                     .head_dim = out_of_place ? 80 : 64,
                     .rotary_dim = out_of_place ? 40 : 64,
                     .out_of_place = out_of_place,
                     .pairing = pairing,
                     .norm = out_of_place != stored,
                     .angles = bad == Bad::kSlot ? Angles::kFrequencies : Angles::kTable,
                     .positions_dtype = stored ? kI64 : kI32,
                     .axes = bad == Bad::kAxis ? Axes::kSections : Axes::kNone,
                     .axes_dtype = kI32,
                     .cache = stored ? Cache::kNhd : Cache::kNone,
                     .cache_dtype = stored && out_of_place ? static_cast<uint32_t>(kE4M3) : 0,
                     .bad = bad});
        }
      }
    });
  }
}

void AddData(List* list) {
  for (const Data data : {Data::kLarge, Data::kTiny, Data::kNonFinite}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool norm : {false, true}) {
        list->Add({.dtype = dtype,
                   .head_dim = 64,
                   .rotary_dim = 48,
                   .data = data,
                   .pairing = pairing,
                   .norm = norm,
                   .positions = Positions::kRandom});
        list->Add({.dtype = dtype,
                   .head_dim = 64,
                   .data = data,
                   .pairing = pairing,
                   .rounding = norm ? ROPEWALK_ROUND_REFERENCE : ROPEWALK_ROUND_FUSED,
                   .angles = Angles::kTable,
                   .positions = Positions::kRandom});
        for (const uint32_t cache_dtype : {static_cast<uint32_t>(kE4M3), static_cast<uint32_t>(kE5M2), dtype}) {
          list->Add({.dtype = dtype,
                     .head_dim = 64,
                     .rotary_dim = 48,
                     .data = data,
                     .pairing = pairing,
                     .rounding = norm ? ROPEWALK_ROUND_REFERENCE : ROPEWALK_ROUND_FUSED,
                     .angles = Angles::kTable,
                     .positions = Positions::kRandom,
                     .cache = Cache::kFlat,
                     .cache_dtype = cache_dtype,
                     .v_dim = 80});
        }
      }
    });
  }
}

// One of the whole product of options.
RopeCase Drawn(Draw& draw) {
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

// So that options meet which no list above brings together.
void AddMixed(List* list) {
  Draw draw(2026);
  for (int i = 0; i < 1100; ++i) list->Add(Drawn(draw));
}

// k stored, but not written back: each way that a kernel of it may take, with tokens that are not stored.
void AddStoreOnly(List* list) {
  size_t turn = 0;
  for (const int64_t head_dim : {64, 80, 96, 128, 256}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const uint32_t cache_dtype : {dtype, static_cast<uint32_t>(kE4M3), static_cast<uint32_t>(kE5M2)}) {
        const bool norm = ++turn % 2 == 0, part = head_dim == 80 || head_dim == 96;
        list->Add({.dtype = dtype,
                   .batch = turn % 4 == 3 ? 2 : 0,
                   .tokens = turn % 5 == 0 ? 70 : 7,
                   .q_heads = turn % 3 == 0 ? 8 : 3,
                   .head_dim = head_dim,
                   .rotary_dim = part ? 24 : 0,
                   .rotary_offset = head_dim == 96 ? 40 : 0,
                   .layout = kLayouts[turn % std::size(kLayouts)],
                   .out_of_place = turn % 3 == 1,
                   .pairing = pairing,
                   .rounding = turn % 5 == 2 ? ROPEWALK_ROUND_REFERENCE : ROPEWALK_ROUND_FUSED,
                   .norm = norm,
                   .weight = norm ? Weight::kPlain : Weight::kNone,
                   .angles = turn % 3 == 2 ? Angles::kTable : Angles::kFrequencies,
                   .positions = Positions::kRandom,
                   .cache = turn % 2 ? Cache::kNhd : Cache::kHnd,
                   .cache_dtype = cache_dtype,
                   .page_size = turn % 7 == 0 ? 5 : 16,
                   .store_v = turn % 5 != 1,
                   .k_store_only = true,
                   .slots = turn % 3 == 0   ? Slots::kAll
                            : turn % 3 == 1 ? Slots::kSkips
                                            : Slots::kNothing});
      }
    });
  }
  // Poisoned and padding tokens, subnormal numbers, and what the other lists do not bring together.
  for (const Bad bad : {Bad::kPosition, Bad::kSlot, Bad::kAxis, Bad::kPaddedPosition}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      const bool neox = pairing == ROPEWALK_NEOX;
      list->Add({.dtype = dtype,
                 .tokens = 8,
                 .head_dim = 64,
                 .rotary_dim = neox ? 64 : 40,
                 .out_of_place = neox,
                 .pairing = pairing,
                 .norm = !neox,
                 .angles = bad == Bad::kSlot ? Angles::kFrequencies : Angles::kTable,
                 .axes = bad == Bad::kAxis ? Axes::kSections : Axes::kNone,
                 .axes_dtype = kI32,
                 .cache = Cache::kNhd,
                 .cache_dtype = neox ? static_cast<uint32_t>(kE4M3) : 0,
                 .k_store_only = true,
                 .slots = Slots::kSkips,
                 .bad = bad});
    });
  }
  for (const Data data : {Data::kTiny, Data::kMixed}) {
    EachType([&](uint32_t dtype, int32_t pairing) {
      for (const bool fp8 : {false, true}) {
        list->Add({.dtype = dtype,
                   .data = data,
                   .pairing = pairing,
                   .norm = fp8,
                   .cache = Cache::kFlat,
                   .cache_dtype = fp8 ? static_cast<uint32_t>(kE5M2) : 0,
                   .k_store_only = true});
      }
    });
  }
  Draw draw(2027);
  for (int i = 0; i < 240; ++i) {
    RopeCase c = Drawn(draw);
    c.k_store_only = true;
    list->Add(c);
  }
}

// Beyond what the lists hold: any even head size and part of it, more heads and tokens, any data, faults.
RopeCase DrawnWide(Draw& draw) {
  constexpr int64_t kWideTokens[] = {1, 4, 6, 7, 33, 79, 80, 300, 800, 1100, 1536, 2500, 3100};
  constexpr Data kAnyData[] = {Data::kLarge, Data::kTiny, Data::kNonFinite, Data::kMixed};
  constexpr Bad kAnyBad[] = {Bad::kPosition, Bad::kSlot, Bad::kAxis, Bad::kPaddedPosition};
  constexpr double kThetas[] = {1e4, 5e5, 1e6};
  RopeCase c = Drawn(draw);
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

// Real models' shapes, with their rotation as far as `theta` and `scaling` say it.
void AddModels(List* list) {
  const std::string llama3 =
      "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
      "\"original_max_position_embeddings\": 8192}";
  const std::string deepseek =
      "{\"rope_type\": \"yarn\", \"factor\": 40.0, \"beta_fast\": 32, \"beta_slow\": 1, \"mscale\": 1.0, "
      "\"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096}";
  const std::string gpt_oss =
      "{\"rope_type\": \"yarn\", \"factor\": 32.0, \"beta_fast\": 32.0, \"beta_slow\": 1.0, \"truncate\": false, "
      "\"original_max_position_embeddings\": 4096}";
  const std::string gemma = "{\"rope_type\": \"linear\", \"factor\": 8.0}";
  const int32_t inter = ROPEWALK_INTERLEAVED;
  const RopeCase models[] = {
      {.model = "Llama-2-7B", .q_heads = 32, .k_heads = 32, .head_dim = 128},
      {.model = "Llama-3.1-8B", .q_heads = 32, .k_heads = 8, .head_dim = 128, .theta = 5e5, .scaling = llama3},
      {.model = "Mistral-7B", .q_heads = 32, .k_heads = 8, .head_dim = 128, .theta = 1e6},
      {.model = "Qwen3-8B", .q_heads = 32, .k_heads = 8, .head_dim = 128, .weight = Weight::kPlain, .theta = 1e6},
      {.model = "Qwen3-30B-A3B", .q_heads = 32, .k_heads = 4, .head_dim = 128, .weight = Weight::kPlain, .theta = 1e6},
      {.model = "Qwen2.5-VL-7B", .q_heads = 28, .k_heads = 4, .head_dim = 128, .theta = 1e6, .axes = Axes::kSections},
      {.model = "Qwen3-VL-8B",
       .q_heads = 32,
       .k_heads = 8,
       .head_dim = 128,
       .weight = Weight::kPlain,
       .theta = 5e6,
       .axes = Axes::kInterleaved},
      {.model = "Gemma-3-4B-global",
       .q_heads = 8,
       .k_heads = 4,
       .head_dim = 256,
       .weight = Weight::kZeroCentered,
       .theta = 1e6,
       .scaling = gemma},
      {.model = "Gemma-3-4B-local", .q_heads = 8, .k_heads = 4, .head_dim = 256, .weight = Weight::kZeroCentered},
      {.model = "Phi-3-mini-128k",
       .q_heads = 32,
       .k_heads = 32,
       .head_dim = 96,
       .scaling = LongRope(48),
       .sequence_length = 8192},
      {.model = "DeepSeek-V3",
       .q_heads = 128,
       .k_heads = 1,
       .head_dim = 192,
       .rotary_dim = 64,
       .rotary_offset = 128,
       .pairing = inter,
       .scaling = deepseek},
      {.model = "DeepSeek-V3-absorbed",
       .q_heads = 128,
       .k_heads = 1,
       .head_dim = 576,
       .rotary_dim = 64,
       .rotary_offset = 512,
       .pairing = inter,
       .scaling = deepseek},
      {.model = "GLM-4-9B", .q_heads = 32, .k_heads = 2, .head_dim = 128, .rotary_dim = 64, .pairing = inter},
      {.model = "GPT-NeoX-20B", .q_heads = 64, .k_heads = 64, .head_dim = 96, .rotary_dim = 24},
      {.model = "GPT-J-6B", .q_heads = 16, .k_heads = 16, .head_dim = 256, .rotary_dim = 64, .pairing = inter},
      {.model = "Command-R", .q_heads = 64, .k_heads = 64, .head_dim = 128, .pairing = inter, .theta = 8e6},
      {.model = "gpt-oss-20B", .q_heads = 64, .k_heads = 8, .head_dim = 64, .theta = 150000.0, .scaling = gpt_oss},
      {.model = "SmolLM2-135M", .q_heads = 9, .k_heads = 3, .head_dim = 64, .theta = 1e5},
      {.model = "Flux.1",
       .q_heads = 24,
       .k_heads = 24,
       .head_dim = 128,
       .pairing = inter,
       .weight = Weight::kPlain,
       .axes = Axes::kSections},
      {.model = "Qwen-Image",
       .q_heads = 24,
       .k_heads = 24,
       .head_dim = 128,
       .pairing = inter,
       .weight = Weight::kPlain,
       .axes = Axes::kSections},
      {.model = "Qwen2-VL-vision", .q_heads = 16, .k_heads = 16, .head_dim = 80, .axes = Axes::kTwo},
  };
  for (RopeCase c : models) {
    c.layout = Layout::kPacked;
    for (const int64_t tokens : {1, 16}) {
      c.tokens = tokens;
      c.positions = Positions::kRandom;
      list->Add(c);
    }
    c.cache = Cache::kNhd;
    list->Add(c);
    c.cache = Cache::kNone;
    c.layout = Layout::kTransposed;
    c.batch = 2;
    c.tokens = 3;
    c.rounding = ROPEWALK_ROUND_REFERENCE;
    list->Add(c);
  }
}

// So many tokens that a GPU gives each a block and shapes that by their number and the head. What a warp takes at once
// is of q alone, of q, k and v, and of v alone.
void AddManyTokens(List* list) {
  int number = 0;
  for (const int64_t head_dim : {64, 72, 80, 96, 112, 128, 160, 192}) {
    for (const Cache cache : {Cache::kNone, Cache::kNhd, Cache::kHnd}) {
      const bool table = ++number % 2 == 0;
      list->Add({.dtype = number % 3 ? kBF16 : kF16,
                 .tokens = head_dim == 64    ? 2048
                           : head_dim == 128 ? 1100
                                             : 3073,
                 .q_heads = head_dim > 128 ? 6 : 12,
                 .k_heads = head_dim > 128 ? 1 : 3,
                 .head_dim = head_dim,
                 .layout = number % 5 ? Layout::kPacked : Layout::kSeparate,
                 .pairing = number / 2 % 2 ? ROPEWALK_INTERLEAVED : ROPEWALK_NEOX,
                 .norm = true,
                 .weight = Weight::kPlain,
                 .angles = table ? Angles::kPacked : Angles::kFrequencies,
                 .cache = cache,
                 .cache_dtype = cache == Cache::kHnd ? static_cast<uint32_t>(kE4M3) : 0,
                 .slots = table ? Slots::kSkips : Slots::kAll});
    }
  }
}

// Few tokens, whose heads a GPU spreads over blocks, where heads make no whole number of blocks: each of these once
// wrote heads that there are not.
void AddUnevenHeads(List* list) {
  const auto add = [list](const RopeCase& base, std::initializer_list<int64_t> tokens) {
    for (const int64_t count : tokens) {
      RopeCase c = base;
      c.tokens = count;
      c.positions = Positions::kRandom;
      list->Add(c);
    }
  };
  for (const bool norm : {false, true}) {
    const Weight weight = norm ? Weight::kPlain : Weight::kNone;
    const RopeCase packed = {.layout = Layout::kPacked, .v_behind = true, .weight = weight};
    const RopeCase stored = {.layout = Layout::kPacked, .weight = weight, .cache = Cache::kNhd};
    const auto heads = [](RopeCase c, int64_t q_heads, int64_t k_heads, int64_t head_dim = 128) {
      c.q_heads = q_heads;
      c.k_heads = k_heads;
      c.head_dim = head_dim;
      return c;
    };
    add(heads(packed, 40, 10), {6, 7, 30, 63});  // Phi-4
    add(heads(packed, 20, 5), {2, 5});           // one of two ranks of it
    add(heads(packed, 60, 5), {1, 2});
    add(heads(packed, 40, 5), {3});
    add(heads(stored, 40, 8), {28, 64, 66});  // Qwen3-14B, Qwen2.5-32B
    add(heads(stored, 35, 5, 256), {2});
    add(heads(stored, 48, 4), {26, 40, 60});  // StarCoder2-15B
    add(heads(stored, 48, 1), {6, 16, 26});
    add(heads({.weight = weight}, 80, 10), {16});
  }
  add({.q_heads = 120, .k_heads = 10, .head_dim = 160, .rotary_dim = 70, .weight = Weight::kPlain}, {8});
  add({.dtype = kF32,
       .q_heads = 192,
       .k_heads = 12,
       .layout = Layout::kPacked,
       .v_behind = true,
       .pairing = ROPEWALK_INTERLEAVED,
       .weight = Weight::kPlain},
      {16});
  add({.q_heads = 63,
       .k_heads = 1,
       .head_dim = 256,
       .layout = Layout::kPacked,
       .row_gap = 64,
       .cache = Cache::kNhd,
       .cache_dtype = kE5M2},
      {24});
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

std::string CaseName(const RopeCase& c) {
  std::string name = "rope";
  const auto add = [&name](const auto&... parts) { name += Text(".", parts...); };
  const auto dtype = [](uint32_t type) { return type ? Text("-", ShortName(type)) : Text(); };
  if (!c.model.empty()) add(c.model);
  if (!c.layer_type.empty()) add(c.layer_type);
  add(ShortName(c.dtype));
  add(c.pairing == ROPEWALK_NEOX ? "neox" : "interleaved");
  add("d", c.head_dim);
  if (c.rotary_dim && c.rotary_dim != c.head_dim) add("r", c.rotary_dim);
  if (c.rotary_offset) add("o", c.rotary_offset);
  add(Name(c.angles), c.angles == Angles::kFrequencies ? Text() : dtype(c.table_dtype));
  if (c.angles == Angles::kFrequencies && c.config.empty()) {
    if (!c.scaling.empty()) {
      add(ScalingName(c));
      if (c.scaling.find("truncate") != std::string::npos) name += "-untruncated";
      if (c.sequence_length) name += Text("-", c.sequence_length);
    }
    if (c.theta != 10000.0) add("theta", static_cast<int64_t>(c.theta));
  }
  if (c.inverse) add("inverse");
  if (c.rounding == ROPEWALK_ROUND_REFERENCE) add("reference");
  if (c.norm) {
    add("rms");
    if (c.weight != Weight::kNone) name += Text(c.weight == Weight::kPlain ? "-w" : "-1w", dtype(c.weight_dtype));
    if (c.eps != 1e-6) name += Text("-eps", c.eps);
  }
  if (c.layout != Layout::kSeparate)
    add(Name(c.layout), c.v_behind ? "-v" : "", c.row_gap ? Text("-gap", c.row_gap) : "");
  if (c.out_of_place) add("out");
  if (c.q_heads != 3 || c.k_heads != 2) add("h", c.q_heads, "x", c.k_heads);
  if (c.positions == Positions::kNone) {
    add("pos-none");
  } else {
    add("pos-", Name(c.positions), dtype(c.positions_dtype), c.positions_broadcast ? "-shared" : "");
  }
  if (c.offsets_dtype) add("offsets", dtype(c.offsets_dtype));
  if (c.axes != Axes::kNone) add("axes-", Name(c.axes), c.axes_dtype ? "-given" : "");
  if (c.cache != Cache::kNone) {
    add(Name(c.cache), c.cache == Cache::kFlat ? Text() : Text(c.page_size), dtype(c.cache_dtype));
    if (!c.store_v) name += "-k";
    if (!c.store_k) name += "-v";
    if (c.v_dim && c.v_dim != c.head_dim) name += Text("-v", c.v_dim);
    if (c.scale != Scale::kNone) add("scale-", Name(c.scale));
    add("slots", c.slots == Slots::kAll ? "" : c.slots == Slots::kSkips ? "-skips" : "-nothing", dtype(c.slots_dtype));
    if (c.k_store_only) add("k-store-only");
  }
  if (c.data != Data::kNormal) add(Name(c.data));
  if (c.bad != Bad::kNone) add("bad-", Name(c.bad));
  if (c.batch) add("b", c.batch);
  add("t", c.tokens);
  return name;
}

std::vector<std::string> CaseTags(const RopeCase& c) {
  std::vector<std::string> tags;
  const auto add = [&tags](const auto&... parts) { tags.push_back(Text(parts...)); };
  add("stage=rotate");
  if (c.norm) add("stage=norm");
  if (c.cache != Cache::kNone) add("stage=store");
  add("dtype=", ShortName(c.dtype));
  add("pairing=", c.pairing == ROPEWALK_NEOX ? "neox" : "interleaved");
  const bool whole = c.rotary_dim == 0 || c.rotary_dim == c.head_dim;
  add("rotary=", whole ? "whole" : c.rotary_offset ? "part at an offset" : "part");
  add("angles=", Name(c.angles));
  if (c.angles == Angles::kFrequencies) {
    add("scaling=", ScalingName(c));
  } else {
    add("table=", ShortName(c.table_dtype));
  }
  add("rounding=", c.rounding == ROPEWALK_ROUND_FUSED ? "fused" : "reference");
  if (c.inverse) add("inverse");
  if (c.norm) add("weight=", Name(c.weight));
  add("layout=", Name(c.layout));
  if (c.row_gap) add("layout=gap behind a row");
  if (c.v_behind) add("layout=v behind k");
  add("output=", c.out_of_place ? "out of place" : "in place");
  if (c.k_heads == 0) add("no k");
  if (c.batch) add("batched");
  if (c.tokens == 0) add("no tokens");
  add("positions=", Name(c.positions));
  if (c.positions != Positions::kNone) add("positions=", ShortName(c.positions_dtype));
  if (c.offsets_dtype) add("offsets");
  if (c.axes != Axes::kNone) add("axes=", Name(c.axes));
  if (c.cache != Cache::kNone) {
    add("cache=", Name(c.cache));
    if (c.cache_dtype & kFp8) {
      add("cache=", ShortName(c.cache_dtype));
      add("scale=", Name(c.scale));
    }
    if (c.slots != Slots::kAll) add("slots=", Name(c.slots));
    if (c.k_store_only) add("k only stored");
  }
  if (c.data != Data::kNormal) add("data=", Name(c.data));
  if (c.bad != Bad::kNone) add("bad ", Name(c.bad));
  if (!c.model.empty()) add("model");
  return tags;
}

const std::vector<RopeCase>& RopeCases() {
  static const std::vector<RopeCase> cases = [] {
    List list;
    AddTokens(&list);
    AddHeadDims(&list);
    AddParts(&list);
    AddLayouts(&list);
    AddRules(&list);
    AddTables(&list);
    AddNorms(&list);
    AddStores(&list);
    AddAxes(&list);
    AddBad(&list);
    AddData(&list);
    AddModels(&list);
    AddManyTokens(&list);
    AddMixed(&list);
    AddStoreOnly(&list);
    AddUnevenHeads(&list);
    return list.Take();
  }();
  return cases;
}

std::vector<RopeCase> RandomRopeCases(uint64_t seed, int64_t count) {
  Draw draw(seed);
  List list;
  while (list.size() < count) {
    const RopeCase shape = DrawnShape(draw);
    list.Add(shape);
    for (int tries = 0; tries < 12 && list.size() < count && list.size() % kCallsOfAShape != 0; ++tries)
      list.Add(Another(draw, shape));
  }
  return list.Take();
}

std::vector<RopeCase> EngineCases(bool all) {
  List list;
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

std::vector<RopeCase> CasesOfModel(const ModelConfig& model, std::string_view json, int64_t tokens, uint32_t dtype) {
  std::vector<std::string> layer_types = model.layer_types;
  if (layer_types.empty()) layer_types.emplace_back();
  std::vector<RopeCase> cases;
  for (const std::string& layer_type : layer_types) {
    RopeCase c = {
        .model = model.name,
        .dtype = dtype,
        .tokens = tokens,
        .q_heads = model.q_heads,
        .k_heads = model.k_heads,
        .head_dim = model.head_dim,
        .rotary_dim = model.rule.rotary_dim,
        .rotary_offset = model.rotary_offset,
        .layout = Layout::kPacked,
        .pairing = model.interleaved ? ROPEWALK_INTERLEAVED : ROPEWALK_NEOX,
        .norm = model.norm,
        .weight = !model.norm                  ? Weight::kNone
                  : model.zero_centered_weight ? Weight::kZeroCentered
                                               : Weight::kPlain,
        .eps = model.eps,
        .config = std::string(json),
        .layer_type = layer_type,
    };
    if (!Settle(&c)) continue;
    c.name = CaseName(c);
    cases.push_back(std::move(c));
  }
  return cases;
}

}  // namespace ropewalk
