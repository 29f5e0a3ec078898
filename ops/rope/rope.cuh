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
  // There both vectors of a unit of neighbours may follow each other, and so all its pairs. Those of an access lie
  // apart all the same: in shared memory that is faster, and half of them are enough for a load of cosines.
  static constexpr bool kAdjacent = kFlat && kPairsInside && K::kVector % 8 != 0;
  static constexpr int kRun = kPairsInside && !kAdjacent ? K::kVector / 2 : K::kVector;  // of pairs
  static constexpr int kRounds = kFlat ? K::kFlat : K::kFewTokens ? K::kInFlight : 1;  // of a warp's groups, at once
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
  static constexpr bool kVInLine = kVRides && kLinear && K::kPacked == 2;  // and follow k's
  // fp8 codes of vectors that no access can carry go side by side to the cache, too.
  static constexpr bool kStagedCodes = kFlat && K::kStoreK && K::kCacheDtype != K::kDtype && kVectorBytes % 16 != 0;
  static constexpr int kStageBytes = kFlat ? kHeadsAtOnce * kSpanBytes
                                           : (2 * kUnitsPerLane + kRestPerLane) * K::kThreads * kVectorBytes;
};

// The first element of the first vector of a unit, the distance to the second, and the pair of an element of the unit:
// `i` < kVector numbers its pairs.
template <class K>
constexpr bool kSideBySide = K::kInterleaved && (K::kVector == 1 || Shape<K>::kAdjacent);
template <class K>
__device__ __forceinline__ int UnitBegin(int unit) {
  return K::kRotaryOffset + (kSideBySide<K> ? 2 * K::kVector * unit : K::kVector * unit);
}
template <class K>
constexpr int kUnitDistance = kSideBySide<K> ? K::kVector : K::kRotaryDim / 2;
template <class K>
__device__ __forceinline__ int PairOf(int unit, int i) {
  if constexpr (!Shape<K>::kPairsInside || Shape<K>::kAdjacent) return K::kVector * unit + i;
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
  char* q;           // where strides are constants: where its heads begin, and head 0 of q if k's were the next ones
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
  constexpr int kRun = Shape<K>::kRun;
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
  constexpr int kRun = Shape<K>::kRun;
  if constexpr (kRun % 2 == 0 && (kRun == K::kVector || K::kRotaryDim % 8 == 0)) {
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

// 1 / sqrt(mean + eps): eps of a normal number leaves no subnormal to take care of.
template <rw_u32 kEpsBits>
__device__ __forceinline__ float InverseRoot(float mean) {
  if constexpr (kEpsBits < 0x00800000u) return rsqrtf(mean);
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(mean));
  return r;
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
  char* cache;
  bool stored;          // in the cache
  const void* weight;
  float inverse_scale;  // of an fp8 cache
};

// If `wanted`; few tokens: without a branch.
template <class K, int kSize>
__device__ __forceinline__ void Put(bool wanted, char* at, const Words<kSize>& words) {
  if constexpr (K::kFewTokens) {
    StoreIf(wanted, at, words);
  } else {
    if (wanted) Store(at, words);
  }
}

template <class K, int kCount>
__device__ __forceinline__ void WriteCache(const HeadPlace& head, int begin, const float (&v)[kCount],
                                           const Words<kCount * kBytes<K::kDtype>>& packed) {
  if constexpr (K::kCacheDtype == K::kDtype) {
    Put<K>(head.stored, head.cache + begin * kBytes<K::kDtype>, packed);
  } else {
    float scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scaled[i] = (Shape<K>::kReference ? RoundTo<K::kDtype>(v[i]) : v[i]) * head.inverse_scale;
    }
    Put<K>(head.stored, head.cache + begin, Pack<K::kCacheDtype, kCount>(scaled));
  }
}

// A vector of a head, to its row if `wanted` and to its cache if it is stored and the warp stores at all.
template <class K>
__device__ __forceinline__ void Write(bool wanted, bool stores, const HeadPlace& head, int begin,
                                      const float (&v)[K::kVector], const Words<Shape<K>::kVectorBytes>& packed) {
  if constexpr (Shape<K>::kFlat) {
    *reinterpret_cast<Words<Shape<K>::kVectorBytes>*>(head.out + begin * kBytes<K::kDtype>) = packed;
  } else {
    Put<K>(wanted, head.out + begin * kBytes<K::kDtype>, packed);
  }
  constexpr bool kStores = K::kStoreK || (K::kFewTokens && Shape<K>::kVRides);
  if constexpr (kStores && !(Shape<K>::kFlat && K::kCacheDtype == K::kDtype)) {
    if (stores) WriteCache<K>(head, begin, v, packed);
  }
}

template <class K>
__device__ __forceinline__ float InverseScale(const float* scale, float inverse, int head, int stride) {
  if constexpr (K::kCacheDtype != kRopeE4M3 && K::kCacheDtype != kRopeE5M2) return 1.0f;
  if constexpr (!K::kScalePointers) return inverse;
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
    place = slot - static_cast<rw_i64>(static_cast<rw_u64>(page) << (K::kPageShift - 1));  // a slot may be negative
  }
  if constexpr (K::kCacheHead != 0) {
    return page * K::kCachePage + place * K::kCacheToken + static_cast<rw_i64>(head) * K::kCacheHead;
  }
  return page * cache.batch + place * cache.token + head * cache.head;
}

// Where a head of v begins.
template <class K>
__device__ __forceinline__ char* RowOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_strides& s = a.params.v;
  const rw_i64 at = K::kVToken != 0 ? t.token * K::kVToken + h * K::kVDim : t.token * s.token + h * s.head;
  return static_cast<char*>(const_cast<void*>(a.v)) + ((K::kBatched ? t.batch * s.batch : 0) + at) * kBytes<K::kDtype>;
}

// A head of q or, after those, of k; of few tokens then of v where it takes the same way: its row and its place in the
// cache begin so far before it that the rotated part of q and k and the whole of v lie alike. `like`: a head of the
// same tensor, from which that is told.
template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h, int like) {
  const rope_params& p = a.params;
  constexpr bool kOfV = K::kFewTokens && Shape<K>::kVRides;
  const bool of_q = like < QHeads<K>(p), of_v = kOfV && like >= QHeads<K>(p) + KHeads<K>(p);
  const int of_k = h - QHeads<K>(p), in_cache = of_v ? of_k - KHeads<K>(p) : of_k;
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
  // Of packed rows that hold v behind k it is the next head.
  if (K::kPacked < 2 && of_v) place.in = RowOfV<K>(a, t, in_cache) - K::kRotaryOffset * kBytes<K::kDtype>;
  place.weight = of_q ? a.q_weight : a.k_weight;
  place.cache = nullptr;
  place.stored = false;
  place.inverse_scale = 1.0f;
  if constexpr (K::kStoreK || kOfV) {
    place.stored = (of_v || (K::kStoreK && !of_q)) && t.slot >= 0;
    if (K::kFewTokens || place.stored) {
      const bool to_v = of_v || !K::kStoreK;  // what goes nowhere has its place in a cache that is there
      place.cache = static_cast<char*>(to_v ? a.v_cache : a.k_cache) +
                    (CacheOffset<K>(p, to_v ? p.v_cache : p.k_cache, t.slot, in_cache) -
                     (of_v ? K::kRotaryOffset : 0)) * kBytes<K::kCacheDtype>;
      place.inverse_scale =
          InverseScale<K>(of_v ? a.v_scale : a.k_scale, of_v ? a.v_inverse_scale : a.k_inverse_scale,
                          of_q ? 0 : in_cache, of_v ? p.v_scale_head : p.k_scale_head);
    }
  }
  return place;
}

template <class K>
__device__ __forceinline__ HeadPlace PlaceOf(const rope_cuda_args& a, const Token& t, int h) {
  return PlaceOf<K>(a, t, h, h);
}

// A head of v: where it lies, and where it goes.
template <class K>
__device__ __forceinline__ HeadPlace PlaceOfV(const rope_cuda_args& a, const Token& t, int h) {
  const rope_params& p = a.params;
  HeadPlace place;
  place.in = RowOfV<K>(a, t, h);
  place.out = nullptr;
  place.weight = nullptr;
  place.cache = nullptr;
  place.stored = t.slot >= 0;
  place.inverse_scale = 1.0f;
  if (place.stored) {
    place.cache = static_cast<char*>(a.v_cache) +
                  CacheOffset<K>(p, p.v_cache, t.slot, h) * kBytes<K::kCacheDtype>;
    place.inverse_scale = InverseScale<K>(a.v_scale, a.v_inverse_scale, h, p.v_scale_head);
  }
  return place;
}

template <class K, int kCount = K::kVector>
__device__ __forceinline__ void StoreVector(const HeadPlace& head, int begin,
                                            const Words<kCount * kBytes<K::kDtype>>& words) {
  float v[kCount];
  Unpack<K::kDtype, kCount>(words, v);
  WriteCache<K>(head, begin, v, words);
}

// A head of v to its cache, where its size is another than that of what is rotated.
template <class K>
__device__ __forceinline__ void StoreV(const HeadPlace& head, int lane) {
  if (!head.stored) return;
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

// Flat: calls what(copy, head, byte of the head) for each copy of 16 bytes that the thread makes of the warp's heads
// from `first` on.
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
  static_assert(!S::kStagedCodes || kSize == 2, "16 bytes of a row are 8 codes");
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

  // The thread's share of a head on its way: in registers (of few tokens, of all its heads), or for many tokens in
  // shared memory, where every thread reads only what it fetched itself (flat: what its warp fetched), so that no
  // barrier is needed and several heads are in flight at no cost in registers.
  constexpr int kRests = S::kRestPerLane > 0 ? S::kRestPerLane : 1;
  struct {
    Words<S::kVectorBytes> x[S::kUnitsPerLane], y[S::kUnitsPerLane], rest[kRests];
    WeightWords<K> wx[S::kUnitsPerLane], wy[S::kUnitsPerLane], wrest[kRests];
  } held[K::kFewTokens ? S::kRounds : 1];
  __shared__ Aligned<16> staged[S::kStaged ? (K::kInFlight * S::kStageBytes + 15) / 16 : 1];
  __shared__ Aligned<8> codes[S::kStagedCodes ? S::kHeadsAtOnce * S::kSpan / 8 : 1];
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
  const int turns_end = S::kVRides ? all_heads : heads;
  // Few tokens: a group without a head loads what another has, which costs less than a condition; mostly all have one.
  // Mostly, too, the heads of a warp are of one tensor.
  constexpr int kHeads = K::kQHeads + (K::kKToken != 0 ? (S::kVRides ? 2 : 1) * K::kKHeads : 0);
  constexpr bool kKnown = K::kFewTokens && K::kQHeads != 0 && S::kGroupsPerWarp * K::kLanes == 32;
  constexpr bool kAllTake = kKnown && kHeads % S::kHeadsAtOnce == 0 && (S::kVRides || !K::kStoreV);
  constexpr bool kAlike = kKnown && K::kQHeads % S::kWarpHeads == 0 && K::kKHeads % S::kWarpHeads == 0;
  const auto takes = [&](int h) { return kAllTake || h < turns_end; };
  const auto few_place = [&](int h) {
    const int taken = takes(h) ? h : 0;
    return PlaceOf<K>(a, t, taken, kAlike ? (kAllTake || warp_first < turns_end ? warp_first : 0) : taken);
  };
  const auto flat_head = [&](int stage, int round) {
    return flat(stage) + (round * S::kGroupsPerWarp + group_in_warp) * S::kSpanBytes - S::kSpanBegin * kSize;
  };
  const auto codes_of = [&](int head) { return reinterpret_cast<char*>(codes) + (warp_group + head) * S::kSpan; };
  const auto fetch = [&](int warp_h, int h, int stage, int round = 0) {
    if constexpr (S::kFlat) {
      const auto get = [&](int copy, const char* at) {
        CopyAsync<16>(reinterpret_cast<Aligned<16>*>(flat(stage)) + copy, at);
      };
      const auto in_line = [&](int copy) { return PlaceOf<K>(a, t, warp_h).in + copy * 16; };
      if (S::kVRides && S::kLinear && warp_h + S::kWarpHeads <= (S::kVInLine ? all_heads : heads)) {
        EachCopy<K>(warp_h, [&](int copy, int, int) { get(copy, in_line(copy)); });
      } else {
        EachCopy<K>(warp_h, [&](int copy, int of, int byte) {
          if (beyond(turns_end, warp_h, copy, of)) return;
          get(copy, S::kVRides && !S::kVInLine && of >= heads ? PlaceOfV<K>(a, t, of - heads).in + byte
                    : S::kLinear                              ? in_line(copy)
                                                              : PlaceOf<K>(a, t, of).in + byte);
        });
      }
    } else {
      const auto get = [&](int i, Words<S::kVectorBytes>& words, const char* at) {
        if constexpr (S::kStaged) {
          CopyAsync<S::kVectorBytes>(staged_at(stage, i), at);
        } else {
          words = Load<S::kVectorBytes>(at);
        }
      };
      if (K::kFewTokens || h < turns_end) {
        const bool of_v = S::kVRides && !K::kFewTokens && h >= heads;
        const char* in = K::kFewTokens ? few_place(h).in
                         : of_v        ? PlaceOfV<K>(a, t, h - heads).in - K::kRotaryOffset * kSize
                                       : PlaceOf<K>(a, t, h).in;
#pragma unroll
        for (int i = 0; i < S::kUnitsPerLane; ++i) {
          if (!has_unit(i)) continue;
          const char* at = in + UnitBegin<K>(unit_of(i)) * kSize;
          get(2 * i, held[round].x[i], at);
          get(2 * i + 1, held[round].y[i], at + kUnitDistance<K> * kSize);
        }
#pragma unroll
        for (int i = 0; i < S::kRestPerLane; ++i) {
          if (has_rest(i) && (!S::kVRides || h < heads)) {
            get(2 * S::kUnitsPerLane + i, held[round].rest[i], in + RestBegin<K>(unit_of(i)) * kSize);
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
    // For few tokens everything is asked for at once; for many the weights are in L1 when they are wanted.
#pragma unroll
    for (int round = 0; round < (K::kFewTokens ? S::kRounds : 1); ++round) {
      fetch(warp_first, first + round * S::kGroupsPerWarp, 0, round);
    }
  }
  const auto fetch_weights = [&](const void* weight, int round) {
    if constexpr (K::kWeight != kRopeNoWeight) {
      auto& to = held[round];
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (!has_unit(i)) continue;
        to.wx[i] = LoadWeight<K>(weight, UnitBegin<K>(unit_of(i)));
        to.wy[i] = LoadWeight<K>(weight, UnitBegin<K>(unit_of(i)) + kUnitDistance<K>);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) {
        if (has_rest(i)) to.wrest[i] = LoadWeight<K>(weight, RestBegin<K>(unit_of(i)));
      }
    }
  };
  if constexpr (K::kFewTokens) {
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      const int h = kAlike ? warp_first : first + round * S::kGroupsPerWarp;
      fetch_weights(h >= QHeads<K>(p) && h < heads ? a.k_weight : a.q_weight, round);
    }
  }

#if __CUDA_ARCH__ >= 900
  // The next kernel of the stream may take its place now: it waits, as this one did, for the end and the writes of
  // those before it.
  if constexpr (K::kDependentLaunch == 2) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif

  // A token that cannot be rotated: NaN, or as it was. Few tokens: at the very end, out of the way of the others.
  const bool reports = lane == 0 && first == 0;
  CheckToken<K>(a, row, slot, position, reports && !K::kFewTokens, t);
  const bool served = !(S::kTable || K::kCheckAxes) || !(t.poisoned || t.left_out);
  const auto do_not_serve = [&] {
    if (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
    if (K::kFewTokens) CheckToken<K>(a, row, slot, position, reports, t);
    if (t.left_out && !K::kOutOfPlace) return;
#pragma unroll 1
    for (int h = first; h < heads; h += step) {
#pragma unroll 1
      for (int of = h; of < heads && of < h + S::kWarpHeads; of += S::kGroupsPerWarp) {
        const HeadPlace head = PlaceOf<K>(a, t, of);
        FillHead<K>(head.in, head.out, t.poisoned, lane);
      }
    }
  };
  if (!K::kFewTokens && !served) {
    do_not_serve();
    return;
  }
  float cos[S::kUnitsPerLane][K::kVector], sin[S::kUnitsPerLane][K::kVector];
#pragma unroll
  for (int i = 0; i < S::kUnitsPerLane; ++i) {
    if (!has_unit(i) || !served) continue;
    if constexpr (S::kTable) {
      LoadCosSin<K>(a, t, position, unit_of(i), cos[i], sin[i]);
    } else {
      ComputeCosSin<K>(a, t, position, unit_of(i), cos[i], sin[i]);
    }
  }

  if constexpr (K::kSlotsDtype != kRopeNoDtype) t.slot = served && slot < a.slot_count ? slot : -1;
  // Asked for where it is needed, as it lies in a line of the parameters of its own.
  const auto fault_of = [&] {
    rope_fault* fault = a.fault;
    asm volatile("" : "+l"(fault));
    return fault;
  };
  int stage = 0;
  // Few tokens: one turn, and up to its end no branch behind which a compiler could put a load or an angle off.
  for (int group_h = first, warp_h = warp_first; K::kFewTokens || warp_h < turns_end; group_h += step, warp_h += step) {
    if constexpr (S::kStaged) asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
    if constexpr (S::kFlat) __syncwarp();
    // Mostly all heads of a warp are q's, which no cache takes, or v's, on which there is no work.
    const bool all_q = S::kFlat && S::kStores && K::kQHeads != 0 && warp_h + S::kWarpHeads <= QHeads<K>(p);
    const bool all_v = S::kFlat && S::kVRides && warp_h >= heads;
#pragma unroll(K::kFewTokens ? S::kRounds : 1)
    for (int round = 0; round < (all_v ? 0 : S::kRounds); ++round) {
      const int h = group_h + round * S::kGroupsPerWarp;
      auto& [x, y, rest, wx, wy, wrest] = held[K::kFewTokens ? round : 0];
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
      HeadPlace head = K::kFewTokens ? few_place(h) : PlaceOf<K>(a, t, h < heads ? h : 0);
      if constexpr (S::kFlat) head.out = flat_head(stage, round);
      if constexpr (S::kStagedCodes) head.cache = codes_of(round * S::kGroupsPerWarp + group_in_warp);
      float rstd = 0.0f;
      if constexpr (K::kNorm) {
        if (!K::kFewTokens) fetch_weights(head.weight, 0);
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
        rstd = K::kDtype == kRopeF32 || S::kReference ? __frcp_rn(__fsqrt_rn(mean)) : InverseRoot<K::kEpsBits>(mean);
      }
      const bool rotated = (kAllTake && !S::kVRides) || (kAlike ? warp_first : h) < heads;
      if (K::kFewTokens) head.stored = head.stored && takes(h);
      HeadPlace of_rest = head;
      of_rest.stored = head.stored && rotated;
      const auto write = [&](int begin, float (&v)[K::kVector], const Words<S::kVectorBytes>& raw) {
        auto packed = Pack<K::kDtype, K::kVector>(v);
        if (K::kFewTokens && S::kVRides && !rotated) {
          packed = raw;
          Unpack<K::kDtype, K::kVector>(raw, v);
        }
        Write<K>(rotated && served, !all_q, head, begin, v, packed);
      };
      if (K::kFewTokens || rotated) {
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
          write(begin, vx, x[i]);
          write(begin + kUnitDistance<K>, vy, y[i]);
        }
#pragma unroll
        for (int i = 0; i < S::kRestPerLane; ++i) {
          if (!has_rest(i)) continue;
          const int begin = RestBegin<K>(unit_of(i));
          float v[K::kVector];
          Unpack<K::kDtype, K::kVector>(rest[i], v);
          if constexpr (K::kNorm) {
            NormaliseVector<K>(v, rstd, wrest[i]);
            Write<K>(rotated && served, !all_q, of_rest, begin, v, Pack<K::kDtype, K::kVector>(v));
          } else {
            // The same bits, untouched by any conversion.
            if constexpr (K::kOutOfPlace && !S::kFlat) Put<K>(rotated && served, head.out + begin * kSize, rest[i]);
            if constexpr (K::kStoreK && !(S::kFlat && K::kCacheDtype == K::kDtype)) {
              WriteCache<K>(of_rest, begin, v, rest[i]);
            }
          }
        }
      }
      if constexpr (S::kVRides && !S::kFlat && !K::kFewTokens) {
        if (h >= heads && h < all_heads) {
          const HeadPlace v = PlaceOfV<K>(a, t, h - heads);
#pragma unroll
          for (int i = 0; i < S::kUnitsPerLane; ++i) {
            if (!has_unit(i)) continue;
            const int begin = UnitBegin<K>(unit_of(i)) - K::kRotaryOffset;
            StoreVector<K>(v, begin, held[0].x[i]);
            StoreVector<K>(v, begin + kUnitDistance<K>, held[0].y[i]);
          }
        }
      }
    }
    if constexpr (K::kFewTokens) break;  // the grid has a group for every head
    if constexpr (S::kFlat) {
      __syncwarp();
      const auto words_of = [&](int copy) { return reinterpret_cast<const Aligned<16>*>(flat(stage))[copy].words; };
      const auto put = [&](int copy, const HeadPlace& place, int byte, const Words<16>& words) {
        constexpr int kBegin = K::kRotaryOffset * kSize, kEnd = kBegin + K::kRotaryDim * kSize;
        const bool changed = K::kNorm || K::kOutOfPlace || (byte + 16 > kBegin && byte < kEnd);
        if (changed) Store(S::kLinear ? PlaceOf<K>(a, t, warp_h).out + copy * 16 : place.out + byte, words);
      };
      if (all_q) {
        EachCopy<K>(warp_h, [&](int copy, int of, int byte) { put(copy, PlaceOf<K>(a, t, of), byte, words_of(copy)); });
      } else {
        EachCopy<K>(warp_h, [&](int copy, int of, int byte) {
          const Words<16> words = words_of(copy);
          if (!all_v && !beyond(heads, warp_h, copy, of)) {
            const HeadPlace place = PlaceOf<K>(a, t, of);
            put(copy, place, byte, words);
            if constexpr (K::kStoreK && K::kCacheDtype == K::kDtype) {
              if (place.stored) Store(place.cache + byte, words);
            } else if constexpr (S::kStagedCodes) {
              const Words<8> eight = reinterpret_cast<const Aligned<8>*>(codes_of(0))[copy].words;
              if (place.stored) Store(place.cache + byte / kSize, eight);
            }
          } else if (S::kVRides && of < all_heads) {
            const HeadPlace v = PlaceOfV<K>(a, t, of - heads);
            StoreVector<K, 16 / kSize>(v, byte / kSize, words);
          }
        });
      }
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
    if (reports && served && slot >= a.slot_count) {
      RecordFault(fault_of(), row, kRopeFaultSlot, slot, a.slot_count, p.tokens, 0);
    }
  }
  if (K::kFewTokens && !served) do_not_serve();
#if __CUDA_ARCH__ >= 900
  if constexpr (K::kDependentLaunch == 1) asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace ropewalk

#endif  // ROPEWALK_OPS_ROPE_ROPE_CUH_
