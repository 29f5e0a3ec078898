// The layout for few tokens: the heads of a token are spread over blocks, and a group takes all of its heads at once.
// The kernel issues every load before it uses the first. It has no branch before its end, because a compiler would move
// loads and angles behind one.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_FEW_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_FEW_CUH_

#include "backends/cuda/kernel/group.cuh"

namespace ropewalk {

template <class K>
__device__ __forceinline__ void FewTokens(const rope_cuda_args& a) {
  using S = Shape<K>;
  constexpr int kSize = kBytes<K::kDtype>;
  const Group<K> g = MyGroup<K>(a);
  if (S::kBlockTokens > 1 && !g.inside) return;
  const int step = static_cast<int>(gridDim.y) * S::kHeadsAtOnce;

  // Fetch the second cache line of the parameters now. Read where it is needed, it would be a second miss that waits
  // for the first. The index comes from a register, so the compiler makes this a load of its own, for which nothing
  // waits.
  const void* second_line = nullptr;
  if constexpr (S::kStores) {
    int zero;
    asm volatile("mov.u32 %0, 0;" : "=r"(zero));
    second_line = (&a.slots)[zero];
  }
  if constexpr (K::kDependentLaunch) WaitForOthers();

  Token t = BeginToken<K>(a, g.row);
  // Other loads and sums wait for these two, so they go first: the angles for the position, the stores for the slot.
  const auto loaded_slot = LoadSlot<K>(a, second_line, t.batch, t.token);
  LoadedPosition<K> loaded_position = {};
  if constexpr (!K::kAxes) loaded_position = LoadPosition<K>(a, t.batch, t.token, 0);

  // A group that has no head loads head 0 instead: that costs less than a condition. K::kFull promises that every group
  // has a head, K::kAlike that the heads of a warp all belong to one tensor.
  const auto takes = [&](int h) { return K::kFull || h < g.turns_end; };
  const auto place_of = [&](int h) {
    const int taken = takes(h) ? h : 0;
    return PlaceOf<K>(a, t, taken, K::kAlike ? (K::kFull || g.warp_first < g.turns_end ? g.warp_first : 0) : taken);
  };
  Share<K> shares[S::kRounds];
  ShareWeights<K> weights[S::kRounds];
#pragma unroll
  for (int round = 0; round < S::kRounds; ++round) {
    const int h = g.first + round * S::kWarpShare;
    const char* in = place_of(h).in;
    const auto load = [&](Words<S::kVectorBytes>& words, int begin, int) {
      words = Load<S::kVectorBytes>(in + begin * kSize);
    };
    EachOfUnits<K>(g.lane, shares[round], load);
    if (!S::kVRides || h < g.heads) EachOfRest<K>(g.lane, shares[round], load);
  }
#pragma unroll
  for (int round = 0; round < S::kRounds; ++round) {
    const int h = K::kAlike ? g.warp_first : g.first + round * S::kWarpShare;
    LoadWeights<K>(h >= QHeads<K>(a.params) && h < g.heads ? a.k_weight : a.q_weight, g.lane, weights[round]);
  }
  // The next kernel takes its place now, but it waits for the end of this one, as this one waited.
  if constexpr (K::kDependentLaunch == 2) LetTheNextStart<2>(loaded_position.position);
  if constexpr (K::kDependentLaunch == 3) LetTheNextStart<3>();
  const rw_i64 slot = Widen(loaded_slot), position = Position(loaded_position);

  // A token that cannot be served is only marked here. The work for it is at the very end, out of the way of the
  // others.
  const bool reports = g.lane == 0 && g.first == 0;
  CheckToken<K>(a, g.row, slot, position, false, t);
  const bool served = !(S::kTable || K::kCheckAxes) || !(t.poisoned || t.left_out);
  Angles<K> angles;
  FindAngles<K>(a, t, position, g.lane, served, angles);
  if constexpr (K::kSlotsDtype != kRopeNoDtype) t.slot = served && slot < a.slot_count ? slot : -1;

#pragma unroll
  for (int round = 0; round < S::kRounds; ++round) {
    const int h = g.first + round * S::kWarpShare;
    const Share<K>& share = shares[round];
    HeadPlace head = place_of(h);
    const float rstd = K::kNorm ? InverseRms<K>(share, g.lane) : 0.0f;
    const int like = K::kAlike ? g.warp_first : h;
    const bool rotated = (K::kFull && !S::kVRides) || like < g.heads;
    const bool written = (K::kKStoreOnly ? like < QHeads<K>(a.params) : rotated) && served;
    head.stored = head.stored && takes(h);
    HeadPlace of_rest = head;
    of_rest.stored = head.stored && rotated;
    WorkOnShare<K>(
        share, weights[round], rstd, angles, g.lane,
        [&](int begin, float (&v)[K::kVector], const Words<S::kVectorBytes>& raw) {
          auto packed = Pack<K::kDtype, K::kVector>(v);
          if (S::kVRides && !rotated) {
            packed = raw;
            Unpack<K::kDtype, K::kVector>(raw, v);
          }
          Write<K>(written, true, head, begin, v, packed);
        },
        [&](int begin, const float (&v)[K::kVector], const Words<S::kVectorBytes>& raw) {
          WriteRest<K>(written, true, of_rest, begin, v, raw);
        });
  }
  if constexpr (K::kStoreV && !S::kVRides) StoreHeadsOfV<K>(a, t, g, step);
  CheckSlot<K>(a, g.row, slot, reports && served);
  if (!served) {
    CheckToken<K>(a, g.row, slot, position, reports, t);
    DoNotServe<K>(a, t, g, step);
  }
  if constexpr (K::kDependentLaunch == 1) LetTheNextStart<1>();
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_FEW_CUH_
