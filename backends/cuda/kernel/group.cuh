// What the three layouts share: a thread's group and token, the elements of a head that it owns, and the work on them.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_GROUP_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_GROUP_CUH_

#include "backends/cuda/kernel/angles.cuh"
#include "backends/cuda/kernel/math.cuh"
#include "backends/cuda/kernel/place.cuh"

namespace ropewalk {

// With ROPEWALK_CHECK_PLANS, in debug builds and on the emulated GPU, a plan that does not fit its call ends the
// kernel. backends/cuda/plan_check.cc proves the same facts before every launch of a new shape.
__device__ __forceinline__ void Expect(bool holds) {
#if defined(ROPEWALK_CHECK_PLANS)
  if (!holds) __trap();
#else
  static_cast<void>(holds);
#endif
}

// Which token and which heads of it a thread works on.
template <class K>
struct Group {
  int lane;             // in the group
  bool idle;            // the thread fills no group: it goes along with the group beside it and writes nothing
  int in_warp;          // the number of the group in its warp
  int heads, all_heads;   // heads of q and k of a token; the same and, if v is stored, its heads
  int turns_end;          // the turns go over heads below this: with those of v where v rides
  int warp_first, first;  // the first head of the warp, and of the group; an idle thread's is beyond every head
  rw_i64 row;
  bool inside;          // false: no token is left for this group, and `row` is the last one again
};

template <class K>
__device__ __forceinline__ Group<K> MyGroup(const rope_cuda_args& a) {
  using S = Shape<K>;
  static_assert(Deals(S::kGrid), "the groups of a block must divide into its tokens");
  static_assert(K::kRotaryDim % (2 * K::kVector) == 0 && K::kRotaryOffset % K::kVector == 0 &&
                    K::kHeadDim % K::kVector == 0, "vectors must not straddle parts of a head");
  static_assert(!S::kStagedCodes || kBytes<K::kDtype> == 2, "16 bytes of a row are 8 codes");
  static_assert(S::kRounds == 1 || !K::kStoreV || S::kVRides, "v is stored by groups that have no more heads");
  static_assert(S::kWarpTokens == 1 || (!S::kFlat && !K::kFewTokens), "the threads of a warp share their token");
  const rope_params& p = a.params;
  const auto thread = static_cast<int>(threadIdx.x);
  Group<K> g;
  g.lane = thread % 32 % K::kLanes;
  g.idle = Idle(S::kGrid, thread);
  g.in_warp = GroupInWarp(S::kGrid, thread);
  const bool has_k = K::kQHeads ? K::kKToken != 0 : a.k != nullptr;
  g.heads = QHeads<K>(p) + (has_k ? KHeads<K>(p) : 0);
  g.all_heads = g.heads + (K::kStoreV ? KHeads<K>(p) : 0);
  g.turns_end = S::kVRides ? g.all_heads : g.heads;
  g.warp_first = (K::kFewTokens ? static_cast<int>(blockIdx.y) * S::kHeadsAtOnce : 0) + WarpFirst(S::kGrid, thread);
  g.first = g.idle ? 1 << 30 : g.warp_first + g.in_warp % S::kWarpShare;
  g.row = blockIdx.x;
  g.inside = true;
  if constexpr (S::kBlockTokens > 1) {
    const rw_i64 rows = (K::kBatched ? p.batch : 1) * p.tokens;
    g.row = g.row * S::kBlockTokens + TokenInBlock(S::kGrid, thread);
    g.inside = g.row < rows;
    if (S::kWarpTokens > 1 && !g.inside) g.row = rows - 1;
  }
#if defined(ROPEWALK_CHECK_PLANS)
  const rw_i64 rows = p.batch * p.tokens, x = gridDim.x;
  Expect(x * S::kBlockTokens >= rows && (x - 1) * S::kBlockTokens < rows);
  Expect(K::kBatched || p.batch == 1);
  Expect(K::kQHeads == 0 || (K::kQHeads == p.q_heads && (!has_k || K::kKHeads == p.k_heads)));
  const int groups_heads = static_cast<int>(gridDim.y) * S::kHeadsAtOnce;
  Expect(K::kFewTokens ? groups_heads >= g.all_heads || (S::kRounds == 1 && groups_heads >= g.heads) : gridDim.y == 1);
  Expect(!K::kFull || (K::kFewTokens && groups_heads == g.turns_end));
#endif
  return g;
}

// The i-th unit of a lane, or the i-th vector of the rest: its number in the head, and whether the head has it.
template <class K>
__device__ __forceinline__ int UnitOf(int lane, int i) {
  return lane + i * K::kLanes;
}
template <class K>
__device__ __forceinline__ bool HasUnit(int lane, int i) {
  return Shape<K>::kUnits % K::kLanes == 0 || UnitOf<K>(lane, i) < Shape<K>::kUnits;
}
template <class K>
__device__ __forceinline__ bool HasRest(int lane, int i) {
  return Shape<K>::kRest % K::kLanes == 0 || UnitOf<K>(lane, i) < Shape<K>::kRest;
}

// A thread's share of a head: all that it owns of it.
template <class K>
struct Share {
  static constexpr int kRests = Shape<K>::kRestPerLane > 0 ? Shape<K>::kRestPerLane : 1;
  Words<Shape<K>::kVectorBytes> x[Shape<K>::kUnitsPerLane], y[Shape<K>::kUnitsPerLane], rest[kRests];
};
template <class K>
struct ShareWeights {
  WeightWords<K> x[Shape<K>::kUnitsPerLane], y[Shape<K>::kUnitsPerLane], rest[Share<K>::kRests];
};

// Call what(vector, its first element in the head, its number in the share) for each vector of a share, or of the
// weights for one.
template <class K, class Of, class What>
__device__ __forceinline__ void EachOfUnits(int lane, Of& of, const What& what) {
#pragma unroll
  for (int i = 0; i < Shape<K>::kUnitsPerLane; ++i) {
    if (!HasUnit<K>(lane, i)) continue;
    const int begin = UnitBegin<K>(UnitOf<K>(lane, i));
    what(of.x[i], begin, 2 * i);
    what(of.y[i], begin + kUnitDistance<K>, 2 * i + 1);
  }
}
template <class K, class Of, class What>
__device__ __forceinline__ void EachOfRest(int lane, Of& of, const What& what) {
#pragma unroll
  for (int i = 0; i < Shape<K>::kRestPerLane; ++i) {
    if (HasRest<K>(lane, i)) what(of.rest[i], RestBegin<K>(UnitOf<K>(lane, i)), 2 * Shape<K>::kUnitsPerLane + i);
  }
}

template <class K>
__device__ __forceinline__ void LoadWeights(const void* weight, int lane, ShareWeights<K>& to) {
  if constexpr (K::kWeight != kRopeNoWeight) {
    const auto load = [&](WeightWords<K>& words, int begin, int) { words = LoadWeight<K>(weight, begin); };
    EachOfUnits<K>(lane, to, load);
    EachOfRest<K>(lane, to, load);
  }
}

// The token of a row. Where strides are constants, also where its heads begin.
template <class K>
__device__ __forceinline__ Token BeginToken(const rope_cuda_args& a, rw_i64 row) {
  const rope_params& p = a.params;
  Token t = {0, row, nullptr, nullptr, -1, false, false};
  SplitRow<K>(p, row, t.batch, t.token);
  if constexpr (K::kQHeads != 0) {
    const auto begin = [&](void* data, const rope_strides& s, int token_stride, int head) {
      const rw_i64 at = (K::kBatched ? t.batch * s.batch : 0) + t.token * token_stride;
      return static_cast<char*>(data) + (at - head * K::kHeadDim) * kBytes<K::kDtype>;
    };
    t.q = begin(a.q, p.q, K::kQToken, 0);
    if constexpr (!K::kPacked && K::kKToken != 0) t.k = begin(a.k, p.k, K::kKToken, K::kQHeads);
  }
  return t;
}

// Programmatic dependent launch: wait until the kernels before this one have ended.
__device__ __forceinline__ void WaitForOthers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Compilers move loads, and work on what was loaded, to either side of other instructions. An exit that no thread takes
// stands in their way.
__device__ __forceinline__ void KeepOrder() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred never; .reg .u32 depth; mov.u32 depth, %ntid.z; setp.ne.u32 never, depth, 1; @never exit;}" ::
          : "memory");
#endif
}
// Let the next kernel start, whose own wait is for the end of this one. K::kDependentLaunch says when: 1 at the end; 2
// when the position has arrived, and with it the first rows; 3 when all loads are issued. Compilers move work on loaded
// values to either side of the launch, which then waits for them or does not. An exit that no thread takes stands in
// their way: before the launch it needs the position, behind it it keeps all such work there.
template <int kWhen>
__device__ __forceinline__ void LetTheNextStart([[maybe_unused]] rw_i64 position = 0) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kWhen == 2) {
    asm volatile(
        "{.reg .pred never; .reg .u32 depth; mov.u32 depth, %%ntid.z; setp.ne.u32 never, depth, 1; "
        "setp.eq.and.s64 never, %0, 0, never; @never exit;}" ::"l"(position)
        : "memory");
  }
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if constexpr (kWhen == 3) KeepOrder();
#endif
}

// The cosines and sines of a thread's pairs.
template <class K>
struct Angles {
  float cos[Shape<K>::kUnitsPerLane][K::kVector], sin[Shape<K>::kUnitsPerLane][K::kVector];
};
template <class K>
__device__ __forceinline__ void FindAngles(const rope_cuda_args& a, const Token& t, rw_i64 position, int lane,
                                           bool served, Angles<K>& angles) {
#pragma unroll
  for (int i = 0; i < Shape<K>::kUnitsPerLane; ++i) {
    if (!HasUnit<K>(lane, i) || !served) continue;
    if constexpr (Shape<K>::kTable) {
      LoadCosSin<K>(a, t, position, UnitOf<K>(lane, i), angles.cos[i], angles.sin[i]);
    } else {
      ComputeCosSin<K>(a, t, position, UnitOf<K>(lane, i), angles.cos[i], angles.sin[i]);
    }
  }
}

// What happens to a token that cannot be rotated: its heads become NaN, or stay as they are (out of place: are copied).
// Each group does this for the heads that it would have rotated.
template <class K>
__device__ __forceinline__ void DoNotServe(const rope_cuda_args& a, const Token& t, const Group<K>& g, int step) {
  if (t.left_out && !K::kOutOfPlace) return;
  const int end = K::kKStoreOnly ? QHeads<K>(a.params) : g.heads;
#pragma unroll 1
  for (int h = g.first; h < end; h += step) {
#pragma unroll 1
    for (int of = h; of < end && of < h + Shape<K>::kWarpHeads; of += Shape<K>::kWarpShare) {
      const HeadPlace head = PlaceOf<K>(a, t, of);
      FillHead<K>(head.in, head.out, t.poisoned, g.lane);
    }
  }
}

// 1 / rms of a head, for all threads of its group.
template <class K>
__device__ __forceinline__ float InverseRms(const Share<K>& share, int lane) {
  float sum = 0.0f, other = 0.0f;  // two sums, so that neither waits for the other
  const auto square = [&](const Words<Shape<K>::kVectorBytes>& words, float& of) {
    float v[K::kVector];
    Unpack<K::kDtype, K::kVector>(words, v);
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) of = fmaf(v[j], v[j], of);
  };
#pragma unroll
  for (int i = 0; i < Shape<K>::kUnitsPerLane; ++i) {
    if (!HasUnit<K>(lane, i)) continue;
    square(share.x[i], sum);
    square(share.y[i], other);
  }
  EachOfRest<K>(lane, share, [&](const Words<Shape<K>::kVectorBytes>& words, int, int) { square(words, sum); });
  const float mean = SumOfGroup<K::kLanes>(sum + other, lane) * (1.0f / K::kHeadDim) + __uint_as_float(K::kEpsBits);
  return K::kDtype == kRopeF32 || Shape<K>::kReference ? __frcp_rn(__fsqrt_rn(mean)) : InverseRoot<K::kEpsBits>(mean);
}

// Normalises and rotates a share. Calls unit(begin, values, the vector as it was loaded) for each vector of the rotated
// part, and rest(begin, values, the vector as it was loaded) for each of the others.
template <class K, class Unit, class Rest>
__device__ __forceinline__ void WorkOnShare(const Share<K>& share, const ShareWeights<K>& weights, float rstd,
                                            const Angles<K>& angles, int lane, const Unit& unit, const Rest& rest) {
#pragma unroll
  for (int i = 0; i < Shape<K>::kUnitsPerLane; ++i) {
    if (!HasUnit<K>(lane, i)) continue;
    const int begin = UnitBegin<K>(UnitOf<K>(lane, i));
    float vx[K::kVector], vy[K::kVector];
    Unpack<K::kDtype, K::kVector>(share.x[i], vx);
    Unpack<K::kDtype, K::kVector>(share.y[i], vy);
    if constexpr (K::kNorm) {
      NormaliseVector<K>(vx, rstd, weights.x[i]);
      NormaliseVector<K>(vy, rstd, weights.y[i]);
    }
    RotateUnit<K>(vx, vy, angles.cos[i], angles.sin[i]);
    unit(begin, vx, share.x[i]);
    unit(begin + kUnitDistance<K>, vy, share.y[i]);
  }
#pragma unroll
  for (int i = 0; i < Shape<K>::kRestPerLane; ++i) {
    if (!HasRest<K>(lane, i)) continue;
    float v[K::kVector];
    Unpack<K::kDtype, K::kVector>(share.rest[i], v);
    if constexpr (K::kNorm) NormaliseVector<K>(v, rstd, weights.rest[i]);
    rest(RestBegin<K>(UnitOf<K>(lane, i)), v, share.rest[i]);
  }
}

// Writes a vector of the rest. Without a norm it is copied as it was loaded, so that no conversion touches it.
template <class K>
__device__ __forceinline__ void WriteRest(bool wanted, bool stores, const HeadPlace& head, int begin,
                                          const float (&v)[K::kVector], const Words<Shape<K>::kVectorBytes>& raw) {
  if constexpr (K::kNorm) {
    Write<K>(wanted, stores, head, begin, v, Pack<K::kDtype, K::kVector>(v));
  } else {
    if constexpr (K::kOutOfPlace && !Shape<K>::kFlat) Put<K>(wanted, head.out + begin * kBytes<K::kDtype>, raw);
    if constexpr (K::kStoreK && !(Shape<K>::kFlat && K::kCacheDtype == K::kDtype)) WriteCache<K>(head, begin, v, raw);
  }
}

// Stores the heads of v where v does not ride. They count as the heads behind those of q and k: whose turn comes after
// the last head of k takes the first head of v.
template <class K>
__device__ __forceinline__ void StoreHeadsOfV(const rope_cuda_args& a, const Token& t, const Group<K>& g, int step) {
  int h = g.first;
  if (h < g.heads) h += (g.heads - h + step - 1) / step * step;
  for (; h < g.all_heads; h += step) StoreV<K>(PlaceOfV<K>(a, t, h - g.heads), g.lane);
}

// Reports a slot that lies behind the end of the cache.
template <class K>
__device__ __forceinline__ void CheckSlot(const rope_cuda_args& a, rw_i64 row, rw_i64 slot, bool reports) {
  if constexpr (K::kSlotsDtype != kRopeNoDtype) {
    if (reports && slot >= a.slot_count) {
      rope_fault* fault = a.fault;
      asm volatile("" : "+l"(fault));  // loaded here and not earlier: it is in a cache line that few variants touch
      RecordFault(fault, row, kRopeFaultSlot, slot, a.slot_count, a.params.tokens, 0);
    }
  }
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_GROUP_CUH_
