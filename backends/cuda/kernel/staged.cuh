// A layout for many tokens: a block has one token or several, and the groups of a token take its heads in turns. While
// a group works on one head, the next ones travel through shared memory and take no registers. A thread reads only what
// it fetched itself, so there is no barrier. An asynchronous copy carries at least 4 bytes: smaller vectors are loaded
// to registers.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_STAGED_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_STAGED_CUH_

#include "backends/cuda/kernel/group.cuh"

namespace ropewalk {

template <class K>
__device__ __forceinline__ void Staged(const rope_cuda_args& a) {
  using S = Shape<K>;
  constexpr int kSize = kBytes<K::kDtype>, kStep = S::kHeadsAtOnce;
  const Group<K> g = MyGroup<K>(a);
  if (S::kBlockTokens > 1 && S::kWarpTokens == 1 && !g.inside) return;
  if constexpr (K::kDependentLaunch) WaitForOthers();
  Token t = BeginToken<K>(a, g.row);
  const auto loaded_slot = LoadSlot<K>(a, a.slots, t.batch, t.token);
  LoadedPosition<K> loaded_position = {};
  if constexpr (!K::kAxes) loaded_position = LoadPosition<K>(a, t.batch, t.token, 0);
  // Else a position of 32 bits is asked for behind the rows that are fetched, where it is widened: norm + rope of 28/4
  // heads of 128 at 4,096 tokens took 19.6 us for 18.4.
  if constexpr (K::kPositionsDtype == kRopeI32 && K::kDependentLaunch > 1) KeepOrder();

  Share<K> share;
  __shared__ Aligned<16> staged[S::kStaged ? (K::kInFlight * S::kStageBytes + 15) / 16 : 1];
  const auto staged_at = [&](int stage, int i) {
    return reinterpret_cast<Words<S::kVectorBytes>*>(reinterpret_cast<char*>(staged) + stage * S::kStageBytes) +
           i * K::kThreads + threadIdx.x;
  };
  const auto fetch = [&](int h, int stage) {
    if (h < g.turns_end) {
      const bool of_v = S::kVRides && h >= g.heads;
      const char* in =
          of_v ? PlaceOfV<K>(a, t, h - g.heads).in - K::kRotaryOffset * kSize : PlaceOf<K>(a, t, h).in;
      const auto get = [&](Words<S::kVectorBytes>& words, int begin, int number) {
        if constexpr (S::kStaged) {
          CopyAsync<S::kVectorBytes>(staged_at(stage, number), in + begin * kSize);
        } else {
          words = Load<S::kVectorBytes>(in + begin * kSize);
        }
      };
      EachOfUnits<K>(g.lane, share, get);
      if (!S::kVRides || h < g.heads) EachOfRest<K>(g.lane, share, get);
    }
    if constexpr (S::kStaged) asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if constexpr (S::kStaged) {
#pragma unroll
    for (int stage = 0; stage < K::kInFlight; ++stage) fetch(g.first + stage * kStep, stage);
  } else {
    fetch(g.first, 0);
  }
  if constexpr (K::kDependentLaunch == 2) LetTheNextStart<2>(loaded_position.position);
  if constexpr (K::kDependentLaunch == 3) LetTheNextStart<3>();
  const rw_i64 slot = Widen(loaded_slot), position = Position(loaded_position);

  const bool reports = g.lane == 0 && g.first == 0 && (S::kWarpTokens == 1 || g.inside);
  CheckToken<K>(a, g.row, slot, position, reports, t);
  bool served = !(S::kTable || K::kCheckAxes) || !(t.poisoned || t.left_out);
  if (S::kWarpTokens == 1 && !served) {
    if (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
    DoNotServe<K>(a, t, g, kStep);
    return;
  }
  Angles<K> angles;
  FindAngles<K>(a, t, position, g.lane, served, angles);
  // Where the groups of a warp have different tokens they all go on to the end: they meet at the shuffles of the norm.
  if (S::kWarpTokens > 1) served = served && g.inside;
  if constexpr (K::kSlotsDtype != kRopeNoDtype) t.slot = served && slot < a.slot_count ? slot : -1;

  int stage = 0;
  for (int h = g.first, warp_h = g.warp_first; warp_h < g.turns_end; h += kStep, warp_h += kStep) {
    if constexpr (S::kStaged) {
      asm volatile("cp.async.wait_group %0;" ::"n"(K::kInFlight - 1) : "memory");
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        share.x[i] = *staged_at(stage, 2 * i);
        share.y[i] = *staged_at(stage, 2 * i + 1);
      }
#pragma unroll
      for (int i = 0; i < S::kRestPerLane; ++i) share.rest[i] = *staged_at(stage, 2 * S::kUnitsPerLane + i);
    }
    const HeadPlace head = PlaceOf<K>(a, t, h < g.heads ? h : 0);
    ShareWeights<K> weights;  // loaded again for each head: they are in L1
    float rstd = 0.0f;
    if constexpr (K::kNorm) {
      LoadWeights<K>(head.weight, g.lane, weights);
      rstd = InverseRms<K>(share, g.lane);
    }
    if (h < g.heads && (S::kWarpTokens == 1 || served)) {
      const bool written = !K::kKStoreOnly || h < QHeads<K>(a.params);
      WorkOnShare<K>(
          share, weights, rstd, angles, g.lane,
          [&](int begin, float (&v)[K::kVector], const Words<S::kVectorBytes>&) {
            Write<K>(written, true, head, begin, v, Pack<K::kDtype, K::kVector>(v));
          },
          [&](int begin, const float (&v)[K::kVector], const Words<S::kVectorBytes>& raw) {
            WriteRest<K>(written, true, head, begin, v, raw);
          });
    }
    if constexpr (S::kVRides) {
      if (h >= g.heads && h < g.all_heads && (S::kWarpTokens == 1 || served)) {
        const HeadPlace v = PlaceOfV<K>(a, t, h - g.heads);
        EachOfUnits<K>(g.lane, share, [&](const Words<S::kVectorBytes>& words, int begin, int) {
          StoreVector<K>(v, begin - K::kRotaryOffset, words);
        });
      }
    }
    if constexpr (S::kStaged) {
      fetch(h + K::kInFlight * kStep, stage);
      stage = stage + 1 == K::kInFlight ? 0 : stage + 1;
    } else {
      fetch(h + kStep, 0);
    }
  }
  if constexpr (K::kStoreV && !S::kVRides) {
    if (S::kWarpTokens == 1 || served) StoreHeadsOfV<K>(a, t, g, kStep);
  }
  CheckSlot<K>(a, g.row, slot, reports && served);
  if (S::kWarpTokens > 1 && !served && g.inside) {
    if (S::kStaged) asm volatile("cp.async.wait_all;" ::: "memory");
    DoNotServe<K>(a, t, g, kStep);
  }
  if constexpr (K::kDependentLaunch == 1) LetTheNextStart<1>();
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_STAGED_CUH_
