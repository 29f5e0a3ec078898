// The other layout for many tokens: a warp fetches its heads as one run of bytes, 16 for each lane, whichever lane owns
// them, and writes them back in the same way. So an access stays whole where the half of a head fills no sectors of 32
// bytes, as in heads of 80. Between fetching and writing, lanes find what they own in shared memory.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_FLAT_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_FLAT_CUH_

#include "backends/cuda/kernel/group.cuh"

namespace ropewalk {

// Calls what(copy, head, byte of the head) for each 16 bytes that this thread copies. The heads are those of its warp,
// of which `first` is the first.
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
__device__ __forceinline__ void Flat(const rope_cuda_args& a) {
  using S = Shape<K>;
  constexpr int kSize = kBytes<K::kDtype>, kStep = S::kHeadsAtOnce;
  const Group<K> g = MyGroup<K>(a);
  if (S::kBlockTokens > 1 && !g.inside) return;
  if constexpr (K::kDependentLaunch) WaitForOthers();
  Token t = BeginToken<K>(a, g.row);
  const auto loaded_slot = LoadSlot<K>(a, a.slots, t.batch, t.token);
  LoadedPosition<K> loaded_position = {};
  if constexpr (!K::kAxes) loaded_position = LoadPosition<K>(a, t.batch, t.token, 0);

  __shared__ Aligned<16> staged[(K::kInFlight * S::kStageBytes + 15) / 16];
  __shared__ Aligned<8> codes[S::kStagedCodes ? S::kBlockHeads * S::kSpan / 8 : 1];
  // In shared memory: where a stage of this warp begins, where a head of this thread's group does, and the fp8 codes of
  // a head of this warp.
  const int warp_in_stage = static_cast<int>(threadIdx.x) / 32 * S::kWarpHeads;
  const auto flat = [&](int stage) {
    return reinterpret_cast<char*>(staged) + stage * S::kStageBytes + warp_in_stage * S::kSpanBytes;
  };
  const auto flat_head = [&](int stage, int round) {
    return flat(stage) + (round * S::kWarpShare + g.in_warp) * S::kSpanBytes - S::kSpanBegin * kSize;
  };
  const auto codes_of = [&](int head) { return reinterpret_cast<char*>(codes) + (warp_in_stage + head) * S::kSpan; };
  // Whether a copy lies behind the heads below `limit`. The warp's heads begin with `warp_h`, and `of` is the copy's
  // head.
  const auto beyond = [&](int limit, int warp_h, int copy, int of) {
    return S::kLinear ? copy >= (limit - warp_h) * S::kCopies : of >= limit;
  };
  const auto fetch = [&](int warp_h, int stage) {
    const auto get = [&](int copy, const char* at) {
      CopyAsync<16>(reinterpret_cast<Aligned<16>*>(flat(stage)) + copy, at);
    };
    const auto in_line = [&](int copy) { return PlaceOf<K>(a, t, warp_h).in + copy * 16; };
    if (S::kVRides && S::kLinear && warp_h + S::kWarpHeads <= (S::kVInLine ? g.all_heads : g.heads)) {
      EachCopy<K>(warp_h, [&](int copy, int, int) { get(copy, in_line(copy)); });
    } else {
      EachCopy<K>(warp_h, [&](int copy, int of, int byte) {
        if (beyond(g.turns_end, warp_h, copy, of)) return;
        get(copy, S::kVRides && !S::kVInLine && of >= g.heads ? PlaceOfV<K>(a, t, of - g.heads).in + byte
                  : S::kLinear                                ? in_line(copy)
                                                              : PlaceOf<K>(a, t, of).in + byte);
      });
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int stage = 0; stage < K::kInFlight; ++stage) fetch(g.warp_first + stage * kStep, stage);
  if constexpr (K::kDependentLaunch == 2) LetTheNextStart<2>(loaded_position.position);
  if constexpr (K::kDependentLaunch == 3) LetTheNextStart<3>();
  const rw_i64 slot = Widen(loaded_slot), position = Position(loaded_position);

  const bool reports = g.lane == 0 && g.first == 0;
  CheckToken<K>(a, g.row, slot, position, reports, t);
  const bool served = !(S::kTable || K::kCheckAxes) || !(t.poisoned || t.left_out);
  if (!served) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    DoNotServe<K>(a, t, g, kStep);
    return;
  }
  Angles<K> angles;
  FindAngles<K>(a, t, position, g.lane, served, angles);
  if constexpr (K::kSlotsDtype != kRopeNoDtype) t.slot = slot < a.slot_count ? slot : -1;

  int stage = 0;
  for (int group_h = g.first, warp_h = g.warp_first; warp_h < g.turns_end; group_h += kStep, warp_h += kStep) {
    asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
    __syncwarp();
    // Most warps have heads of q only, which no cache takes, or of v only, which need no work.
    const bool all_q = S::kStores && K::kQHeads != 0 && warp_h + S::kWarpHeads <= QHeads<K>(a.params);
    const bool all_v = S::kVRides && warp_h >= g.heads;
#pragma unroll 1
    for (int round = 0; round < (all_v ? 0 : S::kRounds); ++round) {
      const int h = group_h + round * S::kWarpShare;
      // Loaded whether there is a head or not: a condition would cost more than the loads.
      Share<K> share;
      const auto load = [&](Words<S::kVectorBytes>& words, int begin, int) {
        words = *reinterpret_cast<const Words<S::kVectorBytes>*>(flat_head(stage, round) + begin * kSize);
      };
      EachOfUnits<K>(g.lane, share, load);
      EachOfRest<K>(g.lane, share, load);
      if constexpr (S::kIdleThreads) __syncwarp();  // idle threads have read what others will overwrite
      HeadPlace head = PlaceOf<K>(a, t, h < g.heads ? h : 0);
      head.out = flat_head(stage, round);
      if constexpr (S::kStagedCodes) head.cache = codes_of(round * S::kWarpShare + g.in_warp);
      ShareWeights<K> weights;
      float rstd = 0.0f;
      if constexpr (K::kNorm) {
        LoadWeights<K>(head.weight, g.lane, weights);
        rstd = InverseRms<K>(share, g.lane);
      }
      if (h < g.heads) {
        WorkOnShare<K>(
            share, weights, rstd, angles, g.lane,
            [&](int begin, float (&v)[K::kVector], const Words<S::kVectorBytes>&) {
              Write<K>(true, !all_q, head, begin, v, Pack<K::kDtype, K::kVector>(v));
            },
            [&](int begin, const float (&v)[K::kVector], const Words<S::kVectorBytes>& raw) {
              WriteRest<K>(true, !all_q, head, begin, v, raw);
            });
      }
    }
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
        if (!all_v && !beyond(g.heads, warp_h, copy, of)) {
          const HeadPlace place = PlaceOf<K>(a, t, of);
          if (!K::kKStoreOnly || of < QHeads<K>(a.params)) put(copy, place, byte, words);
          if constexpr (K::kStoreK && K::kCacheDtype == K::kDtype) {
            if (place.stored) Store(place.cache + byte, words);
          } else if constexpr (S::kStagedCodes) {
            const Words<8> eight = reinterpret_cast<const Aligned<8>*>(codes_of(0))[copy].words;
            if (place.stored) Store(place.cache + byte / kSize, eight);
          }
        } else if (S::kVRides && of < g.all_heads) {
          const HeadPlace v = PlaceOfV<K>(a, t, of - g.heads);
          StoreVector<K, 16 / kSize>(v, byte / kSize, words);
        }
      });
    }
    fetch(warp_h + K::kInFlight * kStep, stage);
    stage = stage + 1 == K::kInFlight ? 0 : stage + 1;
  }
  if constexpr (K::kStoreV && !S::kVRides) StoreHeadsOfV<K>(a, t, g, kStep);
  CheckSlot<K>(a, g.row, slot, reports);
  if constexpr (K::kDependentLaunch == 1) LetTheNextStart<1>();
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_FLAT_CUH_
