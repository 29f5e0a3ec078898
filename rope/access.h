// How wide a GPU's accesses can be: what the addresses, the strides and the parts of a head allow. For the plans of
// backends/cuda/plan.cc and backends/spirv/plan.cc.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "rope/call.h"

namespace ropewalk {

// Of an element; `dtype` is one of params.h.
inline int RopeDtypeBytes(uint8_t dtype) {
  switch (dtype) {
    case kRopeF32:
    case kRopeI32: return 4;
    case kRopeI64: return 8;
    case kRopeE4M3:
    case kRopeE5M2: return 1;
    default: return 2;
  }
}

// The largest power of two up to `limit` that divides the address, in elements of `bytes`, and every stride.
inline int Alignment(int limit, const void* data, int bytes, std::initializer_list<int64_t> strides) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto divides = [&](int vector) {
    return address % static_cast<uintptr_t>(vector * bytes) == 0 &&
           std::ranges::all_of(strides, [&](int64_t stride) { return stride % vector == 0; });
  };
  while (limit > 1 && !divides(limit)) limit /= 2;
  return limit;
}

// Elements of the widest access, up to `most_bytes`, that every tensor and every part of a head allows; of whole heads,
// if their parts need not be told apart.
inline int ChooseVector(const RopeCall& call, int most_bytes, bool whole_heads = false) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  const int bytes = RopeDtypeBytes(v.dtype), cache_bytes = RopeDtypeBytes(v.cache_dtype);
  int vector = most_bytes / bytes;
  const auto parts_fit = [&] {
    return whole_heads || (p.rotary_offset % vector == 0 && p.rotary_dim / 2 % vector == 0);
  };
  while (p.head_dim % vector || !parts_fit() || (v.store_v && p.v_dim % vector)) vector /= 2;
  const auto align = [&](const void* data, int element_bytes, const rope_strides& s) {
    if (data) vector = Alignment(vector, data, element_bytes, {s.batch, s.token, s.head});
  };
  align(t.q, bytes, p.q);
  align(t.q_out, bytes, p.q_out);
  align(t.k, bytes, p.k);
  align(t.k_out, bytes, p.k_out);
  align(t.v, bytes, p.v);
  align(t.k_cache, cache_bytes, p.k_cache);
  align(t.v_cache, cache_bytes, p.v_cache);
  if (v.weight_dtype != kRopeNoDtype) {
    const int weight_bytes = RopeDtypeBytes(v.weight_dtype);
    vector = Alignment(vector, t.q_weight, weight_bytes, {});
    vector = Alignment(vector, t.k_weight, weight_bytes, {});  // none is a multiple of anything
  }
  return vector;
}

}  // namespace ropewalk
