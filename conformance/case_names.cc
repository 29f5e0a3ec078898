// What a case is called, and what it exercises.
// SPDX-License-Identifier: Apache-2.0
#include <initializer_list>

#include "base/text.h"
#include "conformance/cases.h"

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

}  // namespace ropewalk
