// Calls from the whole space that a plan must serve, as LowerRope would make them but without tensors: addresses are
// numbers. For the tests of plans, which run millions of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "conformance/case_list.h"
#include "rope/access.h"
#include "rope/call.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ROPEWALK_FEW_PLANS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ROPEWALK_FEW_PLANS 1
#endif
#endif

namespace ropewalk {

// Of each pair of q_heads and k_heads, of which KHeadsOf makes about 2,500. Fewer under a sanitizer.
#ifdef ROPEWALK_FEW_PLANS
constexpr int kPlansOfEach = 20;
#else
constexpr int kPlansOfEach = 1000;
#endif

using PlanDraw = Draw;

// k_heads that may stand beside so many q_heads: its divisors, none, and others.
inline std::vector<int> KHeadsOf(int q_heads, PlanDraw& draw) {
  std::vector<int> k_heads = {0};
  for (int k = 1; k <= q_heads; ++k) {
    if (q_heads % k == 0) k_heads.push_back(k);
  }
  for (int i = 0; i < 3; ++i) k_heads.push_back(static_cast<int>(draw.From(1, 256)));
  return k_heads;
}

// A part of a head: head_dim, rotary_dim, rotary_offset.
struct PlanPart {
  int head_dim, rotary_dim, rotary_offset;
};
inline PlanPart DrawPart(PlanDraw& draw) {
  constexpr int kHeadDims[] = {64, 64, 96, 128, 128, 128, 128, 256, 80, 112, 160, 192, 32, 72, 512, 576};
  PlanPart part{};
  part.head_dim = draw.OneIn(3) ? 2 * static_cast<int>(draw.From(1, draw.OneIn(50) ? 4096 : 320)) : draw.Of(kHeadDims);
  part.rotary_dim = part.head_dim;
  if (draw.OneIn(3)) {
    const int unit = part.head_dim % 16 == 0 && !draw.OneIn(4) ? 16 : 2;
    part.rotary_dim = unit * static_cast<int>(draw.From(1, part.head_dim / unit));
    const int rest = part.head_dim - part.rotary_dim;
    part.rotary_offset = draw.OneIn(2) ? 0 : draw.OneIn(2) ? rest : static_cast<int>(draw.From(0, rest));
  }
  return part;
}

// A call of these heads and tokens, all else drawn: every stage, dtype, layout and alignment.
inline RopeCall DrawCall(PlanDraw& draw, int q_heads, int k_heads, PlanPart part, int64_t tokens) {
  constexpr uint8_t kElementDtypes[] = {kRopeF32, kRopeF16, kRopeBF16, kRopeBF16};
  constexpr uint8_t kIndexDtypes[] = {kRopeI32, kRopeI64};
  constexpr int64_t kPageSizes[] = {1, 2, 3, 5, 16, 24, 64, 128, 1000, 65536};
  RopeCall call;
  std::memset(&call.params, 0, sizeof(call.params));
  RopeVariant& v = call.variant;
  rope_params& p = call.params;
  RopeTensors& t = call.tensors;
  call.device = {kDLCPU, 0};

  v.dtype = draw.Of(kElementDtypes);
  v.pairing = draw.OneIn(2);
  v.inverse = draw.OneIn(4);
  v.rounding = draw.OneIn(4);
  v.norm = draw.OneIn(2);
  if (v.norm && !draw.OneIn(3)) {
    v.weight = draw.OneIn(3) ? uint8_t{kRopeZeroCenteredWeight} : uint8_t{kRopeWeight};
    v.weight_dtype = draw.Of(kElementDtypes);
  }
  v.positions_dtype = draw.OneIn(4) ? uint8_t{kRopeNoDtype} : draw.Of(kIndexDtypes);
  v.offsets_dtype = draw.OneIn(4) ? draw.Of(kIndexDtypes) : uint8_t{kRopeNoDtype};
  v.axes = draw.OneIn(6) ? static_cast<uint8_t>(draw.From(1, 2)) : uint8_t{0};

  p.batch = draw.OneIn(4) ? draw.From(1, 5) : 1;
  p.tokens = tokens;
  p.q_heads = q_heads;
  p.k_heads = k_heads;
  p.head_dim = part.head_dim;
  p.rotary_dim = part.rotary_dim;
  p.rotary_offset = part.rotary_offset;
  p.axes = v.axes ? 3 : 1;
  p.eps = 1e-6f;
  p.attention_scaling = p.k_scale = p.v_scale = 1.0f;

  if (k_heads && draw.OneIn(2)) {
    v.store_v = !draw.OneIn(4);
    constexpr uint8_t kStores[] = {kRopeStore, kRopeStore, kRopeStoreOnly}, kFp8Dtypes[] = {kRopeE4M3, kRopeE5M2};
    v.store_k = v.store_v && draw.OneIn(6) ? uint8_t{kRopeNoStore} : draw.Of(kStores);
    v.cache_dtype = draw.OneIn(2) ? v.dtype : draw.Of(kFp8Dtypes);
    v.slots_dtype = draw.Of(kIndexDtypes);
    p.page_size = draw.OneIn(50) ? draw.From(1, int64_t{1} << 62) : draw.Of(kPageSizes);
    p.slots = p.page_size;
    if (v.store_v) p.v_dim = draw.OneIn(2) ? part.head_dim : static_cast<int>(draw.From(1, 288));
  }

  // An address of its own for each tensor, on 256 bytes, or some elements off.
  uintptr_t next = uintptr_t{1} << 44;
  const auto address = [&](int bytes) {
    next += uintptr_t{1} << 40;
    const uint64_t off = draw.OneIn(12) ? 1u << draw.From(0, 4) : 0;
    return reinterpret_cast<void*>(next + off * static_cast<uintptr_t>(bytes));
  };
  const int bytes = RopeDtypeBytes(v.dtype), cache_bytes = RopeDtypeBytes(v.cache_dtype);
  const int64_t row = int64_t{q_heads} * part.head_dim + int64_t{k_heads} * (part.head_dim + p.v_dim);
  const auto lay_out = [&](int64_t layout, int64_t heads, int64_t dim) {
    rope_strides s = {tokens * heads * dim, heads * dim, dim};  // contiguous
    const int64_t gap = draw.OneIn(2) ? 8 : draw.From(1, 7);
    if (layout == 1) s = {tokens * row, row, dim};                   // packed
    if (layout == 2) s = {tokens * heads * dim, dim, tokens * dim};  // transposed
    if (layout == 3) s = {tokens * (heads * dim + gap) + gap, heads * dim + gap, dim};
    if (layout == 4) s = {tokens * heads * (dim + gap), heads * (dim + gap), dim + gap};
    if (layout == 5) s.token = -s.token;
    if (p.batch == 1) s.batch = 0;
    if (tokens == 1) s.token = 0;
    if (heads == 1) s.head = 0;
    return s;
  };
  const int64_t layout = draw.From(0, 5);
  t.q = address(bytes);
  p.q = lay_out(layout, q_heads, part.head_dim);
  if (k_heads) {
    t.k = layout == 1 ? static_cast<char*>(t.q) + int64_t{q_heads} * part.head_dim * bytes : address(bytes);
    p.k = lay_out(layout, k_heads, part.head_dim);
  }
  t.q_out = t.q;
  t.k_out = t.k;
  p.q_out = p.q;
  p.k_out = p.k;
  if (draw.OneIn(4)) {
    t.q_out = address(bytes);
    p.q_out = lay_out(draw.From(0, 5), q_heads, part.head_dim);
    if (k_heads) {
      t.k_out = address(bytes);
      p.k_out = lay_out(draw.From(0, 5), k_heads, part.head_dim);
    }
  }
  if (v.store_k == kRopeStoreOnly) t.k_out = nullptr;
  v.out_of_place = t.q_out != t.q || (t.k_out && t.k_out != t.k);
  const auto cache_strides = [&](int64_t dim) {
    rope_strides s = {p.page_size % 4096 * k_heads * dim, k_heads * dim, dim};
    if (draw.OneIn(3)) s = {p.page_size % 4096 * k_heads * dim, dim, p.page_size % 4096 * dim};  // heads before places
    return s;
  };
  if (v.store_v) {
    t.v = layout == 1 ? static_cast<char*>(t.k) + int64_t{k_heads} * part.head_dim * bytes : address(bytes);
    p.v = lay_out(layout, k_heads, p.v_dim);
    t.v_cache = address(cache_bytes);
    p.v_cache = cache_strides(p.v_dim);
  }
  if (v.store_k) {
    t.k_cache = address(cache_bytes);
    p.k_cache = cache_strides(part.head_dim);
  }
  if (v.slots_dtype) t.slots = address(8);
  if (v.positions_dtype) t.positions = address(8);
  if (v.offsets_dtype) t.offsets = address(8);
  if (v.axes == 2) t.axes = static_cast<const int32_t*>(address(4));
  if (v.weight_dtype) {
    t.q_weight = address(RopeDtypeBytes(v.weight_dtype));
    if (k_heads) t.k_weight = address(RopeDtypeBytes(v.weight_dtype));
  }
  if (draw.OneIn(2)) {
    v.table_dtype = draw.Of(kElementDtypes);
    p.rows = 4096;
    const int table_bytes = RopeDtypeBytes(v.table_dtype), pairs = part.rotary_dim / 2;
    p.cos_pair = p.sin_pair = draw.OneIn(5) ? 2 : 1;
    p.cos_row = p.sin_row = draw.OneIn(3) ? pairs * p.cos_pair : 2 * pairs + (draw.OneIn(6) ? 1 : 0);
    t.cos = address(table_bytes);
    t.sin = draw.OneIn(2) ? static_cast<const char*>(t.cos) + int64_t{pairs} * table_bytes : address(table_bytes);
  }
  return call;
}

// More heads, larger heads and more tokens than anyone has.
inline RopeCall DrawCallAtTheLimits(PlanDraw& draw) {
  const int q_heads = draw.OneIn(3) ? 1 << 20 : static_cast<int>(draw.From(1, 5000));
  // With 2^20 of k and of v a row would be so long that all rows have more elements than 64 bits count.
  const int k_heads = draw.OneIn(3) ? 1 << 19 : static_cast<int>(draw.From(0, 5000));
  const int64_t tokens = draw.OneIn(2) ? (int64_t{1} << 31) / 5 : draw.From(1, 4);
  const PlanPart part = {8192, draw.OneIn(2) ? 8192 : 2 * static_cast<int>(draw.From(1, 4096)), 0};
  RopeCall call = DrawCall(draw, q_heads, k_heads, part, tokens);
  call.params.batch = std::min<int64_t>(call.params.batch, INT32_MAX / tokens);
  return call;
}

// `holds(q_heads, k_heads)` with 1 to 256 heads of q, each beside all that KHeadsOf gives, `times` times each; until it
// is false once: so one sentence is told and not a million.
template <class Holds>
void ForEveryNumberOfHeads(PlanDraw& draw, int times, const Holds& holds) {
  for (int q_heads = 1; q_heads <= 256; ++q_heads) {
    for (const int k_heads : KHeadsOf(q_heads, draw)) {
      for (int i = 0; i < times; ++i) {
        if (!holds(q_heads, k_heads)) return;
      }
    }
  }
}

}  // namespace ropewalk
