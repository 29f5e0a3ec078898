// SPDX-License-Identifier: Apache-2.0
#include "conformance/cases.h"

#include <initializer_list>
#include <iterator>
#include <utility>

#include "base/text.h"
#include "conformance/case_list.h"

namespace ropewalk {

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

namespace {

constexpr int64_t kTokens[] = {0, 1, 2, 5, 17, 64, 257};

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

template <class Body>
void EachType(Body body) {
  for (const uint32_t dtype : kDtypes) {
    for (const int32_t pairing : kPairings) body(dtype, pairing);
  }
}

void AddHeadDims(CaseList* list) {
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

void AddParts(CaseList* list) {
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

void AddRules(CaseList* list) {
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

void AddTables(CaseList* list) {
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

void AddNorms(CaseList* list) {
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

void AddLayouts(CaseList* list) {
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

void AddTokens(CaseList* list) {
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

void AddStores(CaseList* list) {
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

void AddAxes(CaseList* list) {
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

void AddBad(CaseList* list) {
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

void AddData(CaseList* list) {
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

// So that options meet which no list above brings together.
void AddMixed(CaseList* list) {
  Draw draw(2026);
  for (int i = 0; i < 1100; ++i) list->Add(DrawnCase(draw));
}

// k stored, but not written back: each way that a kernel of it may take, with tokens that are not stored.
void AddStoreOnly(CaseList* list) {
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
    RopeCase c = DrawnCase(draw);
    c.k_store_only = true;
    list->Add(c);
  }
}

// Real models' shapes, with their rotation as far as `theta` and `scaling` say it.
void AddModels(CaseList* list) {
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
void AddManyTokens(CaseList* list) {
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
void AddUnevenHeads(CaseList* list) {
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

}  // namespace

const std::vector<RopeCase>& RopeCases() {
  static const std::vector<RopeCase> cases = [] {
    CaseList list;
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

RopeCase EveryArgumentCase(Angles angles) {
  return {.dtype = kBF16,
          .batch = 2,
          .tokens = 6,
          .q_heads = 4,
          .k_heads = 3,
          .head_dim = 32,
          .rotary_dim = 24,
          .out_of_place = true,
          .norm = true,
          .weight = Weight::kPlain,
          .weight_dtype = kF32,
          .angles = angles,
          .offsets_dtype = kI32,
          .axes = Axes::kSections,
          .axes_dtype = kI32,
          .cache = Cache::kNhd,
          .cache_dtype = kE4M3,
          .page_size = 5,
          .v_dim = 48,
          .scale = Scale::kPerHead};
}

}  // namespace ropewalk
