// The CUDA kernel: one body; every stage, dtype and size is a compile-time choice of `K` (made by rope_cuda.cc).
//
// A group of kLanes threads works on a head. A thread holds units of two vectors that belong together: in halves (neox)
// the second lies half the rotated part behind the first, and their elements pair up; of neighbours (interleaved) both
// vectors hold whole pairs, and lie apart only to keep accesses coalesced. So no pairing needs a shuffle. Cosines and
// sines of a thread's pairs are the same for all heads of a token and stay in its registers.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_OPS_ROPE_ROPE_CUH_
#define ROPEWALK_OPS_ROPE_ROPE_CUH_

#include "kernels/cuda/angle.cuh"
#include "kernels/cuda/vector.cuh"
#include "ops/rope/rope_cuda_args.h"

namespace ropewalk {

// What follows from the choices.
template <class K>
struct Shape {
  static constexpr bool kTable = K::kTableDtype != kRopeNoDtype;
  static constexpr bool kReference = K::kRounding == kRopeRoundReference;
  static constexpr bool kStores = K::kCacheDtype != kRopeNoDtype;
  // Neighbours can share a vector, unless it has one element.
  static constexpr bool kPairsInside = K::kInterleaved && K::kVector > 1;
  static constexpr int kVectorBytes = K::kVector * kBytes<K::kDtype>;
  static constexpr int kUnits = K::kRotaryDim / (2 * K::kVector);
  static constexpr int kUnitsPerLane = (kUnits + K::kLanes - 1) / K::kLanes;
  static constexpr int kGroupsPerWarp = 32 / K::kLanes;  // threads left over are idle
  static constexpr int kGroups = K::kThreads / 32 * kGroupsPerWarp;
  // Vectors outside the rotated part, which matter if they are normalised, copied or stored.
  static constexpr bool kRestMatters = K::kNorm || K::kOutOfPlace || K::kStoreK;
  static constexpr int kBefore = K::kRotaryOffset / K::kVector;
  static constexpr int kRest = kRestMatters ? (K::kHeadDim - K::kRotaryDim) / K::kVector : 0;
  static constexpr int kRestPerLane = (kRest + K::kLanes - 1) / K::kLanes;
  // Heads of v take the way of the others, on loads that wait for no slot, where they fill the same vectors.
  static constexpr bool kVRides = K::kStoreV && K::kVDim == K::kRotaryDim;
  // Fetched through shared memory: what one asynchronous copy can carry.
  static constexpr bool kStaged = !K::kFewTokens && kVectorBytes >= 4 && K::kInFlight > 0;
};

// The first element of the first vector of a unit, the distance to the second, and the pair of an element of the unit:
// `i` < kVector numbers its pairs.
template <class K>
__device__ __forceinline__ int UnitBegin(int unit) {
  constexpr bool kAlone = K::kInterleaved && K::kVector == 1;
  return K::kRotaryOffset + (kAlone ? 2 * unit : K::kVector * unit);
}
template <class K>
constexpr int kUnitDistance = K::kInterleaved && K::kVector == 1 ? 1 : K::kRotaryDim / 2;
template <class K>
__device__ __forceinline__ int PairOf(int unit, int i) {
  if constexpr (!Shape<K>::kPairsInside) return K::kVector * unit + i;
  constexpr int kHalf = K::kVector / 2;
  return kHalf * unit + (i < kHalf ? i : K::kRotaryDim / 4 + i - kHalf);
}
template <class K>
__device__ __forceinline__ int RestBegin(int i) {
  return K::kVector * i + (i < Shape<K>::kBefore ? 0 : K::kRotaryDim);
}

// What a token needs beside its heads.
struct Token {
  rw_i64 batch, token;
  rw_i64 slot;       // < 0: not stored
  bool left_out;     // padding with a position outside the table
  bool poisoned;
};

// Heads and strides: constants where the variant knows them.
template <class K>
__device__ __forceinline__ int QHeads(const rope_params& p) {
  return K::kQHeads ? K::kQHeads : p.q_heads;
}
template <class K>
__device__ __forceinline__ int KHeads(const rope_params& p) {
  return K::kQHeads ? K::kKHeads : p.k_heads;
}
template <class K>
__device__ __forceinline__ rw_i64 Offset(const rope_strides& s, int token_stride, rw_i64 batch, rw_i64 token, int head) {
  rw_i64 at = K::kBatched ? batch * s.batch : 0;
  if constexpr (K::kQHeads != 0) return at + token * token_stride + head * K::kHeadDim;
  return at + token * s.token + head * s.head;
}
template <class K>
__device__ __forceinline__ void SplitRow(const rope_params& p, rw_i64 row, rw_i64& batch, rw_i64& token) {
  batch = 0;
  token = row;
  if constexpr (K::kBatched) {
    batch = row / p.tokens;
    token = row - batch * p.tokens;
  }
}

template <class K>
__device__ __forceinline__ rw_i64 PositionOf(const rope_cuda_args& a, rw_i64 batch, rw_i64 token, int axis) {
  const rope_params& p = a.params;
  rw_i64 position = token;
  if constexpr (K::kPositionsDtype != kRopeNoDtype) {
    position = LoadInt<K::kPositionsDtype>(
        a.positions, (K::kAxes ? axis * p.positions_axis : 0) + (K::kBatched ? batch * p.positions_batch : 0) +
            token * p.positions_token);
  }
  if constexpr (K::kOffsetsDtype != kRopeNoDtype) {
    position += LoadInt<K::kOffsetsDtype>(a.offsets, (K::kBatched ? batch * p.offsets_batch : 0) + token * p.offsets_token);
  }
  return position;
}

// Keeps the fault of the lowest row. Rare, so one after the other.
__device__ __forceinline__ void RecordFault(rope_fault* fault, rw_i64 row, int kind, rw_i64 value, rw_i64 limit,
                                         rw_i64 tokens, int axis) {
  if (!fault) return;
  const rw_u64 key = static_cast<rw_u64>(row) * 4 + kind;
  if (key >= *static_cast<volatile rw_u64*>(&fault->key)) return;
  while (atomicCAS(&fault->lock, 0u, 1u) != 0u) __nanosleep(100);
  __threadfence();
  if (key < *static_cast<volatile rw_u64*>(&fault->key)) {
    fault->value = value;
    fault->limit = limit;
    fault->tokens = tokens;
    fault->axis = static_cast<rw_u32>(axis);
    *static_cast<volatile rw_u64*>(&fault->key) = key;
  }
  __threadfence();
  atomicExch(&fault->lock, 0u);
}

// Slot and position of the row; `reports`: whether this thread tells of a fault.
template <class K>
__device__ __forceinline__ Token PlanToken(const rope_cuda_args& a, rw_i64 row, bool reports) {
  const rope_params& p = a.params;
  Token t = {0, row, -1, false, false};
  SplitRow<K>(p, row, t.batch, t.token);
  bool padding = false;
  rw_i64 slot = -1;
  if constexpr (K::kSlotsDtype != kRopeNoDtype) {
    slot = LoadInt<K::kSlotsDtype>(a.slots, t.batch * p.slots_batch + t.token * p.slots_token);
    padding = slot < 0;
  }
  if constexpr (K::kCheckAxes) {
#pragma unroll 1
    for (int i = 0; i < K::kRotaryDim / 2; ++i) {
      const int axis = __ldg(a.axes + i);
      if (axis >= 0 && axis < p.axes) continue;
      t.poisoned = true;
      if (reports) RecordFault(a.fault, row, kRopeFaultAxis, axis, p.axes, p.tokens, i);
      return t;
    }
  }
  if constexpr (Shape<K>::kTable) {
    // Only the rows that pairs take: another may hold anything.
    int last = -1;
#pragma unroll 1
    for (int i = 0; i < (K::kAxes ? K::kRotaryDim / 2 : 1); ++i) {
      const int axis = K::kAxes ? __ldg(a.axes + i) : 0;
      if (axis == last) continue;
      last = axis;
      const rw_i64 position = PositionOf<K>(a, t.batch, t.token, axis);
      if (static_cast<rw_u64>(position) < static_cast<rw_u64>(p.rows)) continue;
      t.left_out = padding;
      t.poisoned = !padding;
      if (reports && !padding) {
        RecordFault(a.fault, row, kRopeFaultPosition, position, p.rows, p.tokens, axis);
      }
      return t;
    }
  }
  if (slot >= p.slots) {
    if (K::kSlotsDtype != kRopeNoDtype && reports) RecordFault(a.fault, row, kRopeFaultSlot, slot, p.slots, p.tokens, 0);
  } else {
    t.slot = slot;
  }
  return t;
}

// Cosines and sines of the pairs of one unit.
template <class K>
__device__ __forceinline__ void CosSinOf(const rope_cuda_args& a, const Token& t, rw_i64 position, int unit,
                                         float (&cos)[K::kVector], float (&sin)[K::kVector]) {
  const rope_params& p = a.params;
  if constexpr (Shape<K>::kTable) {
    // Pairs that follow each other in the table, so that several come with one access.
    constexpr int kRun = Shape<K>::kPairsInside ? K::kVector / 2 : K::kVector;
    constexpr int kStep = K::kTableVector < kRun ? K::kTableVector : kRun;
    constexpr int kSize = kBytes<K::kTableDtype>;
#pragma unroll
    for (int i = 0; i < K::kVector; i += kStep) {
      const int pair = PairOf<K>(unit, i);
      rw_i64 row = position;
      if constexpr (K::kAxes) row = PositionOf<K>(a, t.batch, t.token, __ldg(a.axes + pair));
      const rw_i64 at_cos = t.batch * p.cos_batch + row * p.cos_row, at_sin = t.batch * p.sin_batch + row * p.sin_row;
      if constexpr (kStep > 1) {
        float c[kStep], s[kStep];
        Unpack<K::kTableDtype, kStep>(
            LoadShared<kStep * kSize>(static_cast<const char*>(a.cos) + (at_cos + pair) * kSize), c);
        Unpack<K::kTableDtype, kStep>(
            LoadShared<kStep * kSize>(static_cast<const char*>(a.sin) + (at_sin + pair) * kSize), s);
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
          cos[i + j] = c[j];
          sin[i + j] = K::kInverse ? -s[j] : s[j];
        }
      } else {
        cos[i] = LoadFloat<K::kTableDtype>(a.cos, at_cos + pair * p.cos_pair);
        const float s = LoadFloat<K::kTableDtype>(a.sin, at_sin + pair * p.sin_pair);
        sin[i] = K::kInverse ? -s : s;
      }
    }
  } else {
    // The reduced phase is the product modulo 2^64; its upper half is what a float32 can tell apart.
    // Pairs that follow each other come two at a time.
    rw_u64 turns[K::kVector];
    constexpr int kRun = Shape<K>::kPairsInside ? K::kVector / 2 : K::kVector;
    if constexpr (kRun % 2 == 0 && (!Shape<K>::kPairsInside || K::kRotaryDim % 8 == 0)) {
#pragma unroll
      for (int i = 0; i < K::kVector; i += 2) {
        const ulonglong2 two = __ldg(reinterpret_cast<const ulonglong2*>(a.turns + PairOf<K>(unit, i)));
        turns[i] = two.x;
        turns[i + 1] = two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < K::kVector; ++i) turns[i] = __ldg(a.turns + PairOf<K>(unit, i));
    }
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) {
      rw_i64 at = position;
      if constexpr (K::kAxes) at = PositionOf<K>(a, t.batch, t.token, __ldg(a.axes + PairOf<K>(unit, i)));
      const rw_u32 phase = static_cast<rw_u32>(static_cast<rw_u64>(at) * turns[i] >> 32);
      if constexpr (K::kDtype == kRopeF32 || Shape<K>::kReference) {
        AccurateCosSin(phase, cos[i], sin[i]);
      } else {
        FastCosSin(phase, cos[i], sin[i]);
      }
      if constexpr (!K::kUnitScaling) {
        cos[i] *= p.attention_scaling;
        sin[i] *= p.attention_scaling;
      }
      if constexpr (K::kInverse) sin[i] = -sin[i];
      if constexpr (Shape<K>::kReference) {
        cos[i] = RoundTo<K::kDtype>(cos[i]);
        sin[i] = RoundTo<K::kDtype>(sin[i]);
      }
    }
  }
}

// (x, y) -> (x cos - y sin, y cos + x sin)
template <class K>
__device__ __forceinline__ void RotatePair(float& x, float& y, float c, float s) {
  if constexpr (Shape<K>::kReference) {
    constexpr bool kRound = !Shape<K>::kTable || K::kTableDtype == K::kDtype;
    constexpr int kDtype = kRound ? K::kDtype : kRopeF32;
    const float xc = RoundTo<kDtype>(__fmul_rn(x, c)), ys = RoundTo<kDtype>(__fmul_rn(y, s));
    const float yc = RoundTo<kDtype>(__fmul_rn(y, c)), xs = RoundTo<kDtype>(__fmul_rn(x, s));
    x = __fsub_rn(xc, ys);
    y = __fadd_rn(yc, xs);
  } else {
    const float old = x;
    x = fmaf(-y, s, x * c);
    y = fmaf(old, s, y * c);
  }
}

template <class K>
__device__ __forceinline__ void RotateUnit(float (&x)[K::kVector], float (&y)[K::kVector],
                                           const float (&cos)[K::kVector], const float (&sin)[K::kVector]) {
  if constexpr (Shape<K>::kPairsInside) {
    constexpr int kHalf = K::kVector / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      RotatePair<K>(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
      RotatePair<K>(y[2 * i], y[2 * i + 1], cos[kHalf + i], sin[kHalf + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) RotatePair<K>(x[i], y[i], cos[i], sin[i]);
  }
}

// The weights of a vector, as they lie in memory.
template <class K>
using WeightWords = Words<K::kWeight == kRopeNoWeight ? 4 : kBytes<K::kWeightDtype> * K::kVector>;

template <class K>
__device__ __forceinline__ WeightWords<K> LoadWeight(const void* weight, int begin) {
  if constexpr (K::kWeight == kRopeNoWeight) return {};
  constexpr int kSize = kBytes<K::kWeightDtype>;
  return LoadShared<kSize * K::kVector>(static_cast<const char*>(weight) + begin * kSize);
}

// v times 1 / rms times weight.
template <class K>
__device__ __forceinline__ void NormaliseVector(float (&v)[K::kVector], float rstd, const WeightWords<K>& weight) {
  float w[K::kVector];
  if constexpr (K::kWeight != kRopeNoWeight) Unpack<K::kWeightDtype, K::kVector>(weight, w);
#pragma unroll
  for (int i = 0; i < K::kVector; ++i) {
    const float factor = K::kWeight == kRopeNoWeight ? 1.0f : K::kWeight == kRopeWeight ? w[i] : 1.0f + w[i];
    if constexpr (!Shape<K>::kReference) {
      v[i] = v[i] * rstd * factor;
    } else {
      // Llama rounds, then multiplies by the weight; Gemma multiplies, then rounds.
      const float unit = __fmul_rn(v[i], rstd);
      v[i] = RoundTo<K::kDtype>(
          __fmul_rn(K::kWeight == kRopeZeroCenteredWeight ? unit : RoundTo<K::kDtype>(unit), factor));
    }
  }
}

// The sum over a group of lanes, for all of them. The whole warp takes part.
template <int kLanes>
__device__ __forceinline__ float SumOfGroup(float value, int lane) {
  if constexpr ((kLanes & (kLanes - 1)) == 0) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    return value;
  }
  constexpr int kHalf = kLanes > 16 ? 16 : kLanes > 8 ? 8 : kLanes > 4 ? 4 : kLanes > 2 ? 2 : 1;
  const int begin = threadIdx.x % 32 - lane;
#pragma unroll
  for (int step = kHalf; step > 0; step /= 2) {
    const float other = __shfl_sync(0xffffffffu, value, begin + lane + step);
    if (lane < step && lane + step < kLanes) value += other;
  }
  return __shfl_sync(0xffffffffu, value, begin);
}

// Where a head lies. The element type is known: pointers are to bytes.
struct HeadPlace {
  const char* in;
  char* out;
  char* cache;          // null: not stored
  const void* weight;
  float inverse_scale;  // of an fp8 cache
};

template <class K>
__device__ __forceinline__ void WriteCache(char* cache, int begin, const float (&v)[K::kVector],
                                           const Words<Shape<K>::kVectorBytes>& packed, float inverse_scale) {
  if constexpr (K::kCacheDtype == K::kDtype) {
    Store(cache + begin * kBytes<K::kDtype>, packed);
  } else {
    float scaled[K::kVector];
#pragma unroll
    for (int i = 0; i < K::kVector; ++i) {
      scaled[i] = (Shape<K>::kReference ? RoundTo<K::kDtype>(v[i]) : v[i]) * inverse_scale;
    }
    Store(cache + begin, Pack<K::kCacheDtype, K::kVector>(scaled));
  }
}

template <class K>
__device__ __forceinline__ void Write(const HeadPlace& head, int begin, const float (&v)[K::kVector]) {
  const auto packed = Pack<K::kDtype, K::kVector>(v);
  Store(head.out + begin * kBytes<K::kDtype>, packed);
  if constexpr (K::kStoreK) {
    if (head.cache) WriteCache<K>(head.cache, begin, v, packed, head.inverse_scale);
  }
}

template <class K>
__device__ __forceinline__ float InverseScale(const float* scale, float value, int head, int stride) {
  if constexpr (K::kCacheDtype != kRopeE4M3 && K::kCacheDtype != kRopeE5M2) return 1.0f;
  return 1.0f / (scale ? __ldg(scale + static_cast<rw_i64>(head) * stride) : value);
}

// Where a slot begins in a cache.
template <class K>
__device__ __forceinline__ rw_i64 SlotOffset(const rope_params& p, const rope_strides& cache, rw_i64 slot) {
  if constexpr (K::kPageShift == 64) return slot * cache.token;
  if constexpr (K::kPageShift > 0) {
    const rw_i64 page = slot >> (K::kPageShift - 1);
    return page * cache.batch + (slot - (page << (K::kPageShift - 1))) * cache.token;
  }
  const rw_i64 page = slot / p.page_size;
  return page * cache.batch + (slot - page * p.page_size) * cache.token;
}

template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  constexpr int kSize = kBytes<K::kDtype>;
  HeadPlace place;
  if (h < QHeads<K>(p)) {
    const rw_i64 in = Offset<K>(p.q, K::kQToken, t.batch, t.token, h);
    place.in = static_cast<const char*>(a.q) + in * kSize;
    place.out = K::kOutOfPlace
                    ? static_cast<char*>(a.q_out) + Offset<K>(p.q_out, K::kQToken, t.batch, t.token, h) * kSize
                    : static_cast<char*>(a.q) + in * kSize;
    place.weight = a.q_weight;
    place.cache = nullptr;
    place.inverse_scale = 1.0f;
  } else {
    h -= QHeads<K>(p);
    const rw_i64 in = Offset<K>(p.k, K::kKToken, t.batch, t.token, h);
    place.in = static_cast<const char*>(a.k) + in * kSize;
    place.out = K::kOutOfPlace
                    ? static_cast<char*>(a.k_out) + Offset<K>(p.k_out, K::kKToken, t.batch, t.token, h) * kSize
                    : static_cast<char*>(a.k) + in * kSize;
    place.weight = a.k_weight;
    place.cache = nullptr;
    place.inverse_scale = 1.0f;
    if constexpr (K::kStoreK) {
      if (t.slot >= 0) {
        place.cache = static_cast<char*>(a.k_cache) +
                      (SlotOffset<K>(p, p.k_cache, t.slot) + h * p.k_cache.head) * kBytes<K::kCacheDtype>;
        place.inverse_scale = InverseScale<K>(a.k_scale, p.k_scale, h, p.k_scale_head);
      }
    }
  }
  return place;
}

// A head of v: where it lies, and where it goes (`cache` is null if nowhere).
template <class K>
__device__ __forceinline__ HeadPlace PlaceOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  HeadPlace place;
  place.in = static_cast<const char*>(a.v) +
             ((K::kBatched ? t.batch * p.v.batch : 0) + t.token * p.v.token + h * p.v.head) * kBytes<K::kDtype>;
  place.out = nullptr;
  place.weight = nullptr;
  place.cache = nullptr;
  place.inverse_scale = 1.0f;
  if (t.slot >= 0) {
    place.cache = static_cast<char*>(a.v_cache) +
                  (SlotOffset<K>(p, p.v_cache, t.slot) + h * p.v_cache.head) * kBytes<K::kCacheDtype>;
    place.inverse_scale = InverseScale<K>(a.v_scale, p.v_scale, h, p.v_scale_head);
  }
  return place;
}

template <class K>
__device__ __forceinline__ void StoreVector(const HeadPlace& head, int begin, const Words<Shape<K>::kVectorBytes>& words) {
  float v[K::kVector];
  Unpack<K::kDtype, K::kVector>(words, v);
  WriteCache<K>(head.cache, begin, v, words, head.inverse_scale);
}

// A head of v to its cache, where its size is another than that of what is rotated.
template <class K>
__device__ __forceinline__ void StoreV(const HeadPlace& head, int lane) {
  if (!head.cache) return;
#pragma unroll 2
  for (int i = lane; i < K::kVDim / K::kVector; i += K::kLanes) {
    StoreVector<K>(head, i * K::kVector, Load<Shape<K>::kVectorBytes>(head.in + i * Shape<K>::kVectorBytes));
  }
}

// Every element of the thread's share of a head: NaN, or copied.
template <class K>
__device__ __forceinline__ void FillHead(const char* in, char* out, bool nan, int lane) {
  constexpr int kNanBits = K::kDtype == kRopeF16 ? 0x7e007e00 : K::kDtype == kRopeBF16 ? 0x7fc07fc0 : 0x7fc00000;
  #pragma unroll 1
  for (int i = lane; i < K::kHeadDim / K::kVector; i += K::kLanes) {
    Words<Shape<K>::kVectorBytes> words;
    if (nan) {
#pragma unroll
      for (int j = 0; j < Words<Shape<K>::kVectorBytes>::kCount; ++j) words.w[j] = kNanBits;
    } else {
      words = Load<Shape<K>::kVectorBytes>(in + i * Shape<K>::kVectorBytes);
    }
    Store(out + i * Shape<K>::kVectorBytes, words);
  }
}

template <class K>
__device__ __forceinline__ void RopeBody(const rope_cuda_args& a) {
  using S = Shape<K>;
  constexpr int kSize = kBytes<K::kDtype>;
  static_assert(K::kThreads % 32 == 0 && K::kLanes <= 32, "groups must not straddle warps");
  static_assert(K::kRotaryDim % (2 * K::kVector) == 0 && K::kRotaryOffset % K::kVector == 0 &&
                    K::kHeadDim % K::kVector == 0, "vectors must not straddle parts of a head");

  const rope_params& p = a.params;
  const int lane = threadIdx.x % 32 % K::kLanes, group_in_warp = threadIdx.x % 32 / K::kLanes;
  const int warp_group = threadIdx.x / 32 * S::kGroupsPerWarp;  // the warp's first group
  const bool idle = S::kGroupsPerWarp * K::kLanes != 32 && group_in_warp >= S::kGroupsPerWarp;
  const rw_i64 row = blockIdx.x;
  const bool has_k = K::kQHeads ? K::kKToken != 0 : a.k != nullptr;
  const int heads = QHeads<K>(p) + (has_k ? KHeads<K>(p) : 0);
  const int all_heads = heads + (K::kStoreV ? KHeads<K>(p) : 0);
  const int step = (K::kFewTokens ? gridDim.y : 1) * S::kGroups;
  // All groups of a warp take the same number of turns, so that all its threads meet at the shuffles.
  const int warp_first = (K::kFewTokens ? blockIdx.y * S::kGroups : 0) + warp_group;
  const int first = idle ? 1 << 30 : warp_first + group_in_warp;
  const auto unit_of = [&](int i) { return lane + i * K::kLanes; };
  const auto has_unit = [&](int i) { return S::kUnits % K::kLanes == 0 || unit_of(i) < S::kUnits; };
  const auto has_rest = [&](int i) { return S::kRest % K::kLanes == 0 || unit_of(i) < S::kRest; };

#if __CUDA_ARCH__ >= 900
  if constexpr (K::kDependentLaunch) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  rw_i64 batch, token;
  SplitRow<K>(p, row, batch, token);
  const Token here = {batch, token, -1, false, false};

  // The thread's share of a head on its way: in registers, or for many tokens in shared memory, where every thread reads
  // only what it fetched itself, so that no barrier is needed and several heads are in flight at no cost in registers.
  Words<S::kVectorBytes> x[S::kUnitsPerLane], y[S::kUnitsPerLane];
  Words<S::kVectorBytes> rest[S::kRestPerLane > 0 ? S::kRestPerLane : 1];
  constexpr int kSlots = 2 * S::kUnitsPerLane + S::kRestPerLane;
  __shared__ Aligned<S::kVectorBytes> staged[S::kStaged ? K::kInFlight * kSlots * K::kThreads : 1];
  const auto slot = [&](int stage, int i) { return &staged[(stage * kSlots + i) * K::kThreads + threadIdx.x]; };
  const auto fetch = [&](int h, int stage) {
    if (h < heads) {
      const char* in = PlaceOf<K>(a, here, h).in;
      const auto get = [&](int i, Words<S::kVectorBytes>& words, const char* at) {
        if constexpr (S::kStaged) {
          CopyAsync<S::kVectorBytes>(slot(stage, i), at);
        } else {
          words = Load<S::kVectorBytes>(at);
        }
      };
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (!has_unit(i)) continue;
        const char* at = in + UnitBegin<K>(unit_of(i)) * kSize;
        get(2 * i, x[i], at);
        get(2 * i + 1, y[i], at + kUnitDistance<K> * kSize);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) {
        if (has_rest(i)) get(2 * S::kUnitsPerLane + i, rest[i], in + RestBegin<K>(unit_of(i)) * kSize);
      }
    }
    if constexpr (S::kVRides) {
      if (h >= heads && h < all_heads) {
        const char* in = PlaceOfV<K>(a, here, h - heads).in;
#pragma unroll
        for (int i = 0; i < S::kUnitsPerLane; ++i) {
          if (!has_unit(i)) continue;
          const char* at = in + unit_of(i) * S::kVectorBytes;
          if constexpr (S::kStaged) {
            CopyAsync<S::kVectorBytes>(slot(stage, 2 * i), at);
            CopyAsync<S::kVectorBytes>(slot(stage, 2 * i + 1), at + S::kUnits * S::kVectorBytes);
          } else {
            x[i] = Load<S::kVectorBytes>(at);
            y[i] = Load<S::kVectorBytes>(at + S::kUnits * S::kVectorBytes);
          }
        }
      }
    }
    if constexpr (S::kStaged) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if constexpr (S::kStaged) {
#pragma unroll
    for (int stage = 0; stage < K::kInFlight; ++stage) fetch(first + stage * step, stage);
  } else {
    fetch(first, 0);
  }
  // For few tokens everything is asked for at once; for many the weights are in L1 when they are wanted.
  WeightWords<K> wx[S::kUnitsPerLane], wy[S::kUnitsPerLane], wrest[S::kRestPerLane > 0 ? S::kRestPerLane : 1];
  const auto fetch_weights = [&](const void* weight) {
    if constexpr (K::kWeight != kRopeNoWeight) {
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (!has_unit(i)) continue;
        wx[i] = LoadWeight<K>(weight, UnitBegin<K>(unit_of(i)));
        wy[i] = LoadWeight<K>(weight, UnitBegin<K>(unit_of(i)) + kUnitDistance<K>);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) {
        if (has_rest(i)) wrest[i] = LoadWeight<K>(weight, RestBegin<K>(unit_of(i)));
      }
    }
  };
  if (K::kFewTokens && first < heads) fetch_weights(first < QHeads<K>(p) ? a.q_weight : a.k_weight);

  const Token t = PlanToken<K>(a, row, lane == 0 && first == 0);
  if (S::kTable || K::kCheckAxes) {
    if (t.poisoned || t.left_out) {
      if (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
      if (t.left_out && !K::kOutOfPlace) return;
#pragma unroll 1
      for (int h = first; h < heads; h += step) {
        const HeadPlace head = PlaceOf<K>(a, t, h);
        FillHead<K>(head.in, head.out, t.poisoned, lane);
      }
      return;
    }
  }
  float cos[S::kUnitsPerLane][K::kVector], sin[S::kUnitsPerLane][K::kVector];
  const rw_i64 position = K::kAxes ? 0 : PositionOf<K>(a, t.batch, t.token, 0);
#pragma unroll
  for (int i = 0; i < S::kUnitsPerLane; ++i) {
    if (has_unit(i)) CosSinOf<K>(a, t, position, unit_of(i), cos[i], sin[i]);
  }

  const int turns_end = S::kVRides ? all_heads : heads;
  int stage = 0;
  for (int h = first, warp_h = warp_first; warp_h < turns_end; h += step, warp_h += step) {
    if constexpr (S::kStaged) {
      asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        x[i] = slot(stage, 2 * i)->words;
        y[i] = slot(stage, 2 * i + 1)->words;
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) rest[i] = slot(stage, 2 * S::kUnitsPerLane + i)->words;
    }
    const HeadPlace head = PlaceOf<K>(a, t, h < heads ? h : 0);
    float rstd = 0.0f;
    if constexpr (K::kNorm) {
      if (!K::kFewTokens && h < heads) fetch_weights(head.weight);
      const auto square = [&](const Words<S::kVectorBytes>& words) {
        float v[K::kVector];
        Unpack<K::kDtype, K::kVector>(words, v);
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) rstd = fmaf(v[j], v[j], rstd);
      };
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (!has_unit(i)) continue;
        square(x[i]);
        square(y[i]);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) {
        if (has_rest(i)) square(rest[i]);
      }
      rstd = SumOfGroup<K::kLanes>(rstd, lane);
      const float mean = rstd * (1.0f / K::kHeadDim) + __uint_as_float(K::kEpsBits);
      rstd = K::kDtype == kRopeF32 || S::kReference ? __frcp_rn(__fsqrt_rn(mean)) : rsqrtf(mean);
    }
    if (h < heads) {
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (!has_unit(i)) continue;
        const int begin = UnitBegin<K>(unit_of(i));
        float vx[K::kVector], vy[K::kVector];
        Unpack<K::kDtype, K::kVector>(x[i], vx);
        Unpack<K::kDtype, K::kVector>(y[i], vy);
        if constexpr (K::kNorm) {
          NormaliseVector<K>(vx, rstd, wx[i]);
          NormaliseVector<K>(vy, rstd, wy[i]);
        }
        RotateUnit<K>(vx, vy, cos[i], sin[i]);
        Write<K>(head, begin, vx);
        Write<K>(head, begin + kUnitDistance<K>, vy);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) {
        if (!has_rest(i)) continue;
        const int begin = RestBegin<K>(unit_of(i));
        float v[K::kVector];
        Unpack<K::kDtype, K::kVector>(rest[i], v);
        if constexpr (K::kNorm) {
          NormaliseVector<K>(v, rstd, wrest[i]);
          Write<K>(head, begin, v);
        } else {
          // The same bits, untouched by any conversion.
          if constexpr (K::kOutOfPlace) Store(head.out + begin * kSize, rest[i]);
          if constexpr (K::kStoreK) {
            if (head.cache) WriteCache<K>(head.cache, begin, v, rest[i], head.inverse_scale);
          }
        }
      }
    }
    if constexpr (S::kVRides) {
      if (h >= heads && h < all_heads) {
        const HeadPlace v = PlaceOfV<K>(a, t, h - heads);
        if (v.cache) {
#pragma unroll
          for (int i = 0; i < S::kUnitsPerLane; ++i) {
            if (!has_unit(i)) continue;
            StoreVector<K>(v, unit_of(i) * K::kVector, x[i]);
            StoreVector<K>(v, (S::kUnits + unit_of(i)) * K::kVector, y[i]);
          }
        }
      }
    }
    if constexpr (K::kFewTokens) break;  // the grid has a group for every head
    if constexpr (S::kStaged) {
      fetch(h + K::kInFlight * step, stage);
      stage = stage + 1 == K::kInFlight ? 0 : stage + 1;
    } else {
      fetch(h + step, 0);
    }
  }
  if constexpr (K::kStoreV && !S::kVRides) {
    // After the heads of q and k, in the same order: the group that would take head h + 1 of them takes head 0 of v.
    int h = first;
    if (h < heads) h += (heads - h + step - 1) / step * step;
    for (; h < all_heads; h += step) StoreV<K>(PlaceOfV<K>(a, t, h - heads), lane);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (K::kDependentLaunch) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace ropewalk

#endif  // ROPEWALK_OPS_ROPE_ROPE_CUH_
