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
  // Vectors outside the rotated part, which matter if they are normalised, copied or stored.
  static constexpr bool kRestMatters = K::kNorm || K::kOutOfPlace || K::kStoreK;
  static constexpr int kBefore = K::kRotaryOffset / K::kVector;
  static constexpr int kRest = kRestMatters ? (K::kHeadDim - K::kRotaryDim) / K::kVector : 0;
  static constexpr int kRestPerLane = (kRest + K::kLanes - 1) / K::kLanes;
  // Fetched through shared memory: what one asynchronous copy can carry.
  static constexpr bool kStaged = !K::kFewTokens && kVectorBytes >= 4 && K::kInFlight > 0;
  // Flat: the lanes of a warp fetch and write its heads side by side in 16 bytes each, whatever a lane works on. That
  // keeps accesses whole where the halves of a head do not fill lines of 128 bytes, and lets a vector be of any even
  // number of elements. Of a head, this part:
  static constexpr bool kFlat = kStaged && K::kFlat;
  static constexpr int kRounds = kFlat ? K::kFlat : 1;  // of a warp's groups, on what is fetched at once
  static constexpr int kWarpHeads = kGroupsPerWarp * kRounds;
  static constexpr int kHeadsAtOnce = K::kThreads / 32 * kWarpHeads;
  static constexpr int kSpanBegin = kRestMatters ? 0 : K::kRotaryOffset;
  static constexpr int kSpan = kRestMatters ? K::kHeadDim : K::kRotaryDim;
  static constexpr int kSpanBytes = kSpan * kBytes<K::kDtype>;
  static constexpr int kCopies = kSpanBytes / 16;  // of one head
  static constexpr int kCopiesPerLane = (kWarpHeads * kCopies + 31) / 32;
  static constexpr bool kLinear = K::kPacked && kSpan == K::kHeadDim;  // a warp's heads follow each other in memory
  // Heads of v take the way of the others, on loads that wait for no slot, where they fill the same vectors.
  static constexpr bool kVRides = K::kStoreV && K::kVDim == K::kRotaryDim && (!kFlat || K::kVDim == kSpan);
  static constexpr int kStageBytes = kFlat ? kHeadsAtOnce * kSpanBytes
                                           : (2 * kUnitsPerLane + kRestPerLane) * K::kThreads * kVectorBytes;
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
  char* q;           // where its heads begin, and head 0 of q if k's heads were the next ones; where strides are constants
  char* k;
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
__device__ __forceinline__ rw_i64 Offset(const rope_strides& s, rw_i64 batch, rw_i64 token, int head) {
  return (K::kBatched ? batch * s.batch : 0) + token * s.token + head * s.head;
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
__device__ __forceinline__ rw_i64 Index(rw_i64 token, rw_i64 stride) {
  return K::kDenseIndices ? token : token * stride;
}

template <class K>
__device__ __forceinline__ rw_i64 PositionOf(const rope_cuda_args& a, rw_i64 batch, rw_i64 token, int axis) {
  const rope_params& p = a.params;
  rw_i64 position = token;
  if constexpr (K::kPositionsDtype != kRopeNoDtype) {
    position = LoadInt<K::kPositionsDtype>(
        a.positions, (K::kAxes ? axis * p.positions_axis : 0) + (K::kBatched ? batch * p.positions_batch : 0) +
            Index<K>(token, p.positions_token));
  }
  if constexpr (K::kOffsetsDtype != kRopeNoDtype) {
    position += LoadInt<K::kOffsetsDtype>(a.offsets, (K::kBatched ? batch * p.offsets_batch : 0) +
                                                     Index<K>(token, p.offsets_token));
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

// The slot of a token, as it is given; -1 without slots.
template <class K>
__device__ __forceinline__ rw_i64 SlotOf(const rope_cuda_args& a, const void* slots, rw_i64 batch, rw_i64 token) {
  if constexpr (K::kSlotsDtype == kRopeNoDtype) return -1;
  return LoadInt<K::kSlotsDtype>(slots, (K::kBatched ? batch * a.params.slots_batch : 0) +
                                              Index<K>(token, a.params.slots_token));
}

// Marks a token whose position has no row in the table, and tells of it if this thread `reports`.
template <class K>
__device__ __forceinline__ void CheckToken(const rope_cuda_args& a, rw_i64 row, rw_i64 slot, rw_i64 position,
                                           bool reports, Token& t) {
  const rope_params& p = a.params;
  if constexpr (K::kCheckAxes) {
#pragma unroll 1
    for (int i = 0; i < K::kRotaryDim / 2; ++i) {
      const int axis = __ldg(a.axes + i);
      if (axis >= 0 && axis < p.axes) continue;
      t.poisoned = true;
      if (reports) RecordFault(a.fault, row, kRopeFaultAxis, axis, p.axes, p.tokens, i);
      return;
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
      if constexpr (K::kAxes) position = PositionOf<K>(a, t.batch, t.token, axis);
      if (static_cast<rw_u64>(position) < static_cast<rw_u64>(a.rows)) continue;
      const bool padding = K::kSlotsDtype != kRopeNoDtype && slot < 0;
      t.left_out = padding;
      t.poisoned = !padding;
      if (reports && !padding) RecordFault(a.fault, row, kRopeFaultPosition, position, a.rows, p.tokens, axis);
      return;
    }
  }
}

// Cosines and sines of the pairs of one unit, from the table.
template <class K>
__device__ __forceinline__ void LoadCosSin(const rope_cuda_args& a, const Token& t, rw_i64 position, int unit,
                                           float (&cos)[K::kVector], float (&sin)[K::kVector]) {
  const rope_params& p = a.params;
  // Pairs that follow each other in the table, so that several come with one access.
  constexpr int kRun = Shape<K>::kPairsInside ? K::kVector / 2 : K::kVector;
  constexpr int kStep = K::kTableVector < kRun ? K::kTableVector : kRun;
  constexpr int kSize = kBytes<K::kTableDtype>;
  const auto at = [&](rw_i64 row, rw_i64 batch_stride, rw_i64 row_stride) {
    return (K::kBatched ? t.batch * batch_stride : 0) + row * (K::kTableRow ? K::kTableRow : row_stride);
  };
#pragma unroll
  for (int i = 0; i < K::kVector; i += kStep) {
    const int pair = PairOf<K>(unit, i);
    rw_i64 row = position;
    if constexpr (K::kAxes) row = PositionOf<K>(a, t.batch, t.token, __ldg(a.axes + pair));
    const rw_i64 at_cos = at(row, p.cos_batch, p.cos_row), at_sin = at(row, p.sin_batch, p.sin_row);
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
      const auto pair_at = [&](rw_i64 stride) { return K::kTableRow ? rw_i64{pair} : pair * stride; };
      cos[i] = LoadFloat<K::kTableDtype>(a.cos, at_cos + pair_at(p.cos_pair));
      const float s = LoadFloat<K::kTableDtype>(a.sin, at_sin + pair_at(p.sin_pair));
      sin[i] = K::kInverse ? -s : s;
    }
  }
}

// Cosines and sines of the pairs of one unit, computed.
template <class K>
__device__ __forceinline__ void ComputeCosSin(const rope_cuda_args& a, const Token& t, rw_i64 position, int unit,
                                              float (&cos)[K::kVector], float (&sin)[K::kVector]) {
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
      cos[i] *= a.params.attention_scaling;
      sin[i] *= a.params.attention_scaling;
    }
    if constexpr (K::kInverse) sin[i] = -sin[i];
    if constexpr (Shape<K>::kReference) {
      cos[i] = RoundTo<K::kDtype>(cos[i]);
      sin[i] = RoundTo<K::kDtype>(sin[i]);
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

// The sum over a group of lanes, for all of them. The whole warp takes part. Where kLanes is no power of two, each lane
// adds the runs of 1, 2, 4, .. lanes that follow it round the group, as the bits of kLanes say.
template <int kLanes>
__device__ __forceinline__ float SumOfGroup(float value, int lane) {
  if constexpr ((kLanes & (kLanes - 1)) == 0) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    return value;
  }
  const int begin = threadIdx.x % 32 - lane;
  const auto from = [&](float of, int distance) {
    const int at = lane + distance;
    return __shfl_sync(0xffffffffu, of, begin + (at < kLanes ? at : at - kLanes));
  };
  float sum = 0.0f, run = value;  // of `done` lanes from this one on, and of the next power of two
  int done = 0;
#pragma unroll
  for (int size = 1; size <= kLanes; size *= 2) {
    if (kLanes & size) {
      sum = done == 0 ? run : sum + from(run, done);
      done += size;
    }
    if (2 * size <= kLanes) run += from(run, size);
  }
  return sum;
}

// Where a head lies. The element type is known: pointers are to bytes.
struct HeadPlace {
  const char* in;
  char* out;
  char* cache;          // null: not stored
  const void* weight;
  float inverse_scale;  // of an fp8 cache
};

template <class K, int kCount>
__device__ __forceinline__ void WriteCache(char* cache, int begin, const float (&v)[kCount],
                                           const Words<kCount * kBytes<K::kDtype>>& packed, float inverse_scale) {
  if constexpr (K::kCacheDtype == K::kDtype) {
    Store(cache + begin * kBytes<K::kDtype>, packed);
  } else {
    float scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scaled[i] = (Shape<K>::kReference ? RoundTo<K::kDtype>(v[i]) : v[i]) * inverse_scale;
    }
    Store(cache + begin, Pack<K::kCacheDtype, kCount>(scaled));
  }
}

template <class K>
__device__ __forceinline__ void Write(const HeadPlace& head, int begin, const float (&v)[K::kVector]) {
  const auto packed = Pack<K::kDtype, K::kVector>(v);
  if constexpr (Shape<K>::kFlat) {
    *reinterpret_cast<Words<Shape<K>::kVectorBytes>*>(head.out + begin * kBytes<K::kDtype>) = packed;
  } else {
    Store(head.out + begin * kBytes<K::kDtype>, packed);
  }
  if constexpr (K::kStoreK && !(Shape<K>::kFlat && K::kCacheDtype == K::kDtype)) {
    if (head.cache) WriteCache<K>(head.cache, begin, v, packed, head.inverse_scale);
  }
}

template <class K>
__device__ __forceinline__ float InverseScale(const float* scale, float inverse, int head, int stride) {
  if constexpr (K::kCacheDtype != kRopeE4M3 && K::kCacheDtype != kRopeE5M2) return 1.0f;
  return scale ? 1.0f / __ldg(scale + static_cast<rw_i64>(head) * stride) : inverse;
}

// Where a head of a slot begins in a cache.
template <class K>
__device__ __forceinline__ rw_i64 CacheOffset(const rope_params& p, const rope_strides& cache, rw_i64 slot, int head) {
  rw_i64 page = 0, place = slot;
  if constexpr (K::kPageShift == 0) {
    page = slot / p.page_size;
    place = slot - page * p.page_size;
  } else if constexpr (K::kPageShift < 64) {
    page = slot >> (K::kPageShift - 1);
    place = slot - (page << (K::kPageShift - 1));
  }
  if constexpr (K::kCacheHead != 0) return page * K::kCachePage + place * K::kCacheToken + static_cast<rw_i64>(head) * K::kCacheHead;
  return page * cache.batch + place * cache.token + head * cache.head;
}

// A head of q or, after those, of k.
template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  const bool of_q = h < QHeads<K>(p);
  const int of_k = h - QHeads<K>(p);
  HeadPlace place;
  if constexpr (K::kQHeads != 0) {
    // One multiply-add from the token's begin.
    place.out = (K::kPacked || of_q ? t.q : t.k) + static_cast<rw_i64>(h) * (K::kHeadDim * kBytes<K::kDtype>);
    place.in = place.out;
  } else {
    const auto lies = [&](void* in, void* out, const rope_strides& s, const rope_strides& s_out, int head) {
      place.out = static_cast<char*>(in) + Offset<K>(s, t.batch, t.token, head) * kBytes<K::kDtype>;
      place.in = place.out;
      if constexpr (K::kOutOfPlace) {
        place.out = static_cast<char*>(out) + Offset<K>(s_out, t.batch, t.token, head) * kBytes<K::kDtype>;
      }
    };
    if (of_q) {
      lies(a.q, a.q_out, p.q, p.q_out, h);
    } else {
      lies(a.k, a.k_out, p.k, p.k_out, of_k);
    }
  }
  place.weight = of_q ? a.q_weight : a.k_weight;
  place.cache = nullptr;
  place.inverse_scale = 1.0f;
  if constexpr (K::kStoreK) {
    if (!of_q && t.slot >= 0) {
      place.cache =
          static_cast<char*>(a.k_cache) + CacheOffset<K>(p, p.k_cache, t.slot, of_k) * kBytes<K::kCacheDtype>;
      place.inverse_scale = InverseScale<K>(a.k_scale, a.k_inverse_scale, of_k, p.k_scale_head);
    }
  }
  return place;
}

// A head of v: where it lies, and where it goes (`cache` is null if nowhere).
template <class K>
__device__ __forceinline__ HeadPlace PlaceOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  HeadPlace place;
  const rw_i64 in = K::kVToken != 0 ? t.token * K::kVToken + h * K::kVDim : t.token * p.v.token + h * p.v.head;
  place.in = static_cast<const char*>(a.v) + ((K::kBatched ? t.batch * p.v.batch : 0) + in) * kBytes<K::kDtype>;
  place.out = nullptr;
  place.weight = nullptr;
  place.cache = nullptr;
  place.inverse_scale = 1.0f;
  if (t.slot >= 0) {
    place.cache = static_cast<char*>(a.v_cache) +
                  CacheOffset<K>(p, p.v_cache, t.slot, h) * kBytes<K::kCacheDtype>;
    place.inverse_scale = InverseScale<K>(a.v_scale, a.v_inverse_scale, h, p.v_scale_head);
  }
  return place;
}

template <class K, int kCount = K::kVector>
__device__ __forceinline__ void StoreVector(const HeadPlace& head, int begin, const Words<kCount * kBytes<K::kDtype>>& words) {
  float v[kCount];
  Unpack<K::kDtype, kCount>(words, v);
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
  constexpr int kAccess = Shape<K>::kFlat ? 16 : Shape<K>::kVectorBytes;
#pragma unroll 1
  for (int i = lane; i < K::kHeadDim * kBytes<K::kDtype> / kAccess; i += K::kLanes) {
    Words<kAccess> words;
    if (nan) {
#pragma unroll
      for (int j = 0; j < Words<kAccess>::kCount; ++j) words.w[j] = kNanBits;
    } else {
      words = Load<kAccess>(in + i * kAccess);
    }
    Store(out + i * kAccess, words);
  }
}

// Flat: calls what(copy, head, byte of the head) for each copy of 16 bytes that the thread makes of the warp's heads from
// `first` on.
template <class K, class What>
__device__ __forceinline__ void EachCopy(int first, const What& what) {
  using S = Shape<K>;
#pragma unroll
  for (int i = 0; i < S::kCopiesPerLane; ++i) {
    const int copy = threadIdx.x % 32 + 32 * i;
    if (S::kWarpHeads * S::kCopies % 32 != 0 && copy >= S::kWarpHeads * S::kCopies) continue;
    what(copy, first + copy / S::kCopies, S::kSpanBegin * kBytes<K::kDtype> + copy % S::kCopies * 16);
  }
}

template <class K>
__device__ __forceinline__ void RopeBody(const rope_cuda_args& a) {
  using S = Shape<K>;
  constexpr int kSize = kBytes<K::kDtype>;
  static_assert(K::kThreads % 32 == 0 && K::kLanes <= 32, "groups must not straddle warps");
  static_assert(K::kRotaryDim % (2 * K::kVector) == 0 && K::kRotaryOffset % K::kVector == 0 &&
                    K::kHeadDim % K::kVector == 0, "vectors must not straddle parts of a head");
  static_assert(S::kRounds == 1 || !K::kStoreV || S::kVRides, "v is stored by groups that have no more heads");

  const rope_params& p = a.params;
  const int lane = threadIdx.x % 32 % K::kLanes;
  const int warp_group = threadIdx.x / 32 * S::kWarpHeads;  // the warp's first head of those at once
  // Idle threads look on at the last group's work.
  const bool idle = S::kGroupsPerWarp * K::kLanes != 32 && threadIdx.x % 32 >= S::kGroupsPerWarp * K::kLanes;
  const int group_in_warp = idle ? S::kGroupsPerWarp - 1 : threadIdx.x % 32 / K::kLanes;
  const rw_i64 row = blockIdx.x;
  const bool has_k = K::kQHeads ? K::kKToken != 0 : a.k != nullptr;
  const int heads = QHeads<K>(p) + (has_k ? KHeads<K>(p) : 0);
  const int all_heads = heads + (K::kStoreV ? KHeads<K>(p) : 0);
  const int step = (K::kFewTokens ? gridDim.y : 1) * S::kHeadsAtOnce;
  // All groups of a warp take the same number of turns, so that all its threads meet at the shuffles.
  const int warp_first = (K::kFewTokens ? blockIdx.y * S::kHeadsAtOnce : 0) + warp_group;
  const int first = idle ? 1 << 30 : warp_first + group_in_warp;
  const auto unit_of = [&](int i) { return lane + i * K::kLanes; };
  const auto has_unit = [&](int i) { return S::kUnits % K::kLanes == 0 || unit_of(i) < S::kUnits; };
  const auto has_rest = [&](int i) { return S::kRest % K::kLanes == 0 || unit_of(i) < S::kRest; };

  // The second line of the parameters, asked for without waiting: read in place it would be missed after the first.
  const void* second_line = nullptr;
  if constexpr (K::kFewTokens && S::kStores) {
    int zero;
    asm volatile("mov.u32 %0, 0;" : "=r"(zero));
    second_line = (&a.slots)[zero];
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (K::kDependentLaunch) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  Token t = {0, row, nullptr, nullptr, -1, false, false};
  SplitRow<K>(p, row, t.batch, t.token);
  if constexpr (K::kQHeads != 0) {
    const auto begin = [&](void* data, const rope_strides& s, int token_stride, int head) {
      const rw_i64 at = (K::kBatched ? t.batch * s.batch : 0) + t.token * token_stride;
      return static_cast<char*>(data) + (at - head * K::kHeadDim) * kSize;
    };
    t.q = begin(a.q, p.q, K::kQToken, 0);
    if constexpr (!K::kPacked && K::kKToken != 0) t.k = begin(a.k, p.k, K::kKToken, K::kQHeads);
  }
  // What others wait for comes first: the position for the angles, the slot for the place in the cache.
  const rw_i64 slot = SlotOf<K>(a, K::kFewTokens ? second_line : a.slots, t.batch, t.token);
  const rw_i64 position = K::kAxes ? 0 : PositionOf<K>(a, t.batch, t.token, 0);

  // The thread's share of a head on its way: in registers, or for many tokens in shared memory, where every thread reads
  // only what it fetched itself (flat: what its warp fetched), so that no barrier is needed and several heads are in
  // flight at no cost in registers.
  Words<S::kVectorBytes> x[S::kUnitsPerLane], y[S::kUnitsPerLane];
  Words<S::kVectorBytes> rest[S::kRestPerLane > 0 ? S::kRestPerLane : 1];
  __shared__ Aligned<16> staged[S::kStaged ? (K::kInFlight * S::kStageBytes + 15) / 16 : 1];
  const auto staged_at = [&](int stage, int i) {
    return reinterpret_cast<Words<S::kVectorBytes>*>(reinterpret_cast<char*>(staged) + stage * S::kStageBytes) +
           i * K::kThreads + threadIdx.x;
  };
  // Flat: where a stage of the warp begins, and of the thread's group.
  const auto flat = [&](int stage) {
    return reinterpret_cast<char*>(staged) + stage * S::kStageBytes + warp_group * S::kSpanBytes;
  };
  // Whether a copy of the warp's heads from `warp_h` on is of none below `limit`.
  const auto beyond = [&](int limit, int warp_h, int copy, int of) {
    return S::kLinear ? copy >= (limit - warp_h) * S::kCopies : of >= limit;
  };
  const auto flat_head = [&](int stage, int round) {
    return flat(stage) + (round * S::kGroupsPerWarp + group_in_warp) * S::kSpanBytes - S::kSpanBegin * kSize;
  };
  const auto fetch = [&](int warp_h, int h, int stage) {
    if constexpr (S::kFlat) {
      EachCopy<K>(warp_h, [&](int copy, int of, int byte) {
        if (beyond(S::kVRides ? all_heads : heads, warp_h, copy, of)) return;
        const char* at = S::kVRides && of >= heads ? PlaceOfV<K>(a, t, of - heads).in + byte
                         : S::kLinear             ? PlaceOf<K>(a, t, warp_h).in + copy * 16
                                                  : PlaceOf<K>(a, t, of).in + byte;
        CopyAsync<16>(reinterpret_cast<Aligned<16>*>(flat(stage)) + copy, at);
      });
    } else {
      const auto get = [&](int i, Words<S::kVectorBytes>& words, const char* at) {
        if constexpr (S::kStaged) {
          CopyAsync<S::kVectorBytes>(staged_at(stage, i), at);
        } else {
          words = Load<S::kVectorBytes>(at);
        }
      };
      if (h < heads) {
        const char* in = PlaceOf<K>(a, t, h).in;
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
          const char* in = PlaceOfV<K>(a, t, h - heads).in;
#pragma unroll
          for (int i = 0; i < S::kUnitsPerLane; ++i) {
            if (!has_unit(i)) continue;
            const char* at = in + unit_of(i) * S::kVectorBytes;
            get(2 * i, x[i], at);
            get(2 * i + 1, y[i], at + S::kUnits * S::kVectorBytes);
          }
        }
      }
    }
    if constexpr (S::kStaged) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if constexpr (S::kStaged) {
#pragma unroll
    for (int stage = 0; stage < K::kInFlight; ++stage) fetch(warp_first + stage * step, first + stage * step, stage);
  } else {
    fetch(warp_first, first, 0);
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

  const bool reports = lane == 0 && first == 0;
  CheckToken<K>(a, row, slot, position, reports, t);
  if (S::kTable || K::kCheckAxes) {
    if (t.poisoned || t.left_out) {
      if (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
      if (t.left_out && !K::kOutOfPlace) return;
#pragma unroll 1
      for (int h = first; h < heads; h += step) {
#pragma unroll 1
        for (int of = h; of < heads && of < h + S::kWarpHeads; of += S::kGroupsPerWarp) {
          const HeadPlace head = PlaceOf<K>(a, t, of);
          FillHead<K>(head.in, head.out, t.poisoned, lane);
        }
      }
      return;
    }
  }
  float cos[S::kUnitsPerLane][K::kVector], sin[S::kUnitsPerLane][K::kVector];
#pragma unroll
  for (int i = 0; i < S::kUnitsPerLane; ++i) {
    if (!has_unit(i)) continue;
    if constexpr (S::kTable) {
      LoadCosSin<K>(a, t, position, unit_of(i), cos[i], sin[i]);
    } else {
      ComputeCosSin<K>(a, t, position, unit_of(i), cos[i], sin[i]);
    }
  }

  if constexpr (K::kSlotsDtype != kRopeNoDtype) t.slot = slot < a.slot_count ? slot : -1;
  const int turns_end = S::kVRides ? all_heads : heads;
  int stage = 0;
  for (int group_h = first, warp_h = warp_first; warp_h < turns_end; group_h += step, warp_h += step) {
    if constexpr (S::kStaged) asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
    if constexpr (S::kFlat) __syncwarp();
#pragma unroll 1
    for (int round = 0; round < S::kRounds; ++round) {
      const int h = group_h + round * S::kGroupsPerWarp;
      if constexpr (S::kStaged) {
        if constexpr (S::kFlat) {
          const auto at = [&](int element) {
            return *reinterpret_cast<const Words<S::kVectorBytes>*>(flat_head(stage, round) + element * kSize);
          };
          // Whether there is a head or not: a condition would cost more than the loads.
#pragma unroll
          for (int i = 0; i < S::kUnitsPerLane; ++i) {
            if (!has_unit(i)) continue;
            x[i] = at(UnitBegin<K>(unit_of(i)));
            y[i] = at(UnitBegin<K>(unit_of(i)) + kUnitDistance<K>);
          }
#pragma unroll
          for (int i = 0; i < S::kRestPerLane; ++i) {
            if (has_rest(i)) rest[i] = at(RestBegin<K>(unit_of(i)));
          }
          if constexpr (S::kGroupsPerWarp * K::kLanes != 32) __syncwarp();  // idle threads read what others will write
        } else {
#pragma unroll
          for (int i = 0; i < S::kUnitsPerLane; ++i) {
            x[i] = *staged_at(stage, 2 * i);
            y[i] = *staged_at(stage, 2 * i + 1);
          }
#pragma unroll
          for (int i = 0; i < S::kRestPerLane; ++i) rest[i] = *staged_at(stage, 2 * S::kUnitsPerLane + i);
        }
      }
      HeadPlace head = PlaceOf<K>(a, t, h < heads ? h : 0);
      if constexpr (S::kFlat) head.out = flat_head(stage, round);
      float rstd = 0.0f;
      if constexpr (K::kNorm) {
        if (!K::kFewTokens) fetch_weights(head.weight);
        float other = 0.0f;  // two sums, neither waits for the other
        const auto square = [&](const Words<S::kVectorBytes>& words, float& sum) {
          float v[K::kVector];
          Unpack<K::kDtype, K::kVector>(words, v);
#pragma unroll
          for (int j = 0; j < K::kVector; ++j) sum = fmaf(v[j], v[j], sum);
        };
#pragma unroll
        for (int i = 0; i < S::kUnitsPerLane; ++i) {
          if (!has_unit(i)) continue;
          square(x[i], rstd);
          square(y[i], other);
        }
#pragma unroll
        for (int i = 0; i < S::kRestPerLane; ++i) {
          if (has_rest(i)) square(rest[i], rstd);
        }
        rstd = SumOfGroup<K::kLanes>(rstd + other, lane);
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
            if constexpr (K::kOutOfPlace && !S::kFlat) Store(head.out + begin * kSize, rest[i]);
            if constexpr (K::kStoreK && !(S::kFlat && K::kCacheDtype == K::kDtype)) {
              if (head.cache) WriteCache<K>(head.cache, begin, v, rest[i], head.inverse_scale);
            }
          }
        }
      }
      if constexpr (S::kVRides && !S::kFlat) {
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
    }
    if constexpr (K::kFewTokens) break;  // the grid has a group for every head
    if constexpr (S::kFlat) {
      __syncwarp();
      EachCopy<K>(warp_h, [&](int copy, int of, int byte) {
        constexpr int kBegin = K::kRotaryOffset * kSize, kEnd = kBegin + K::kRotaryDim * kSize;
        const bool changed = K::kNorm || K::kOutOfPlace || (byte + 16 > kBegin && byte < kEnd);
        const Words<16> words = reinterpret_cast<const Aligned<16>*>(flat(stage))[copy].words;
        if (!beyond(heads, warp_h, copy, of)) {
          const HeadPlace place = PlaceOf<K>(a, t, of);
          if (changed) Store(S::kLinear ? PlaceOf<K>(a, t, warp_h).out + copy * 16 : place.out + byte, words);
          if constexpr (K::kStoreK && K::kCacheDtype == K::kDtype) {
            if (place.cache) Store(place.cache + byte, words);
          }
        } else if (S::kVRides && of < all_heads) {
          const HeadPlace v = PlaceOfV<K>(a, t, of - heads);
          if (v.cache) StoreVector<K, 16 / kSize>(v, byte / kSize, words);
        }
      });
    }
    if constexpr (S::kStaged) {
      fetch(warp_h + K::kInFlight * step, group_h + K::kInFlight * step, stage);
      stage = stage + 1 == K::kInFlight ? 0 : stage + 1;
    } else {
      fetch(warp_h + step, group_h + step, 0);
    }
  }
  if constexpr (K::kStoreV && !S::kVRides) {
    // After the heads of q and k, in the same order: the group that would take head h + 1 of them takes head 0 of v.
    int h = first;
    if (h < heads) h += (heads - h + step - 1) / step * step;
    for (; h < all_heads; h += step) StoreV<K>(PlaceOfV<K>(a, t, h - heads), lane);
  }
  if constexpr (K::kSlotsDtype != kRopeNoDtype) {
    if (reports && slot >= a.slot_count) RecordFault(a.fault, row, kRopeFaultSlot, slot, a.slot_count, p.tokens, 0);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (K::kDependentLaunch) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace ropewalk

#endif  // ROPEWALK_OPS_ROPE_ROPE_CUH_
