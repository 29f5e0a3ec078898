// Names for the sizes that follow from the compile-time choices `K` of a variant, and the places of a unit's elements
// in a head. rope.cuh draws them. The two vectors of a unit of neighbours hold whole pairs; they lie apart only so that
// lanes beside each other access memory side by side.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_CUH_

#include "backends/cuda/kernel/vector.cuh"
#include "backends/cuda/kernel/args.h"
#include "backends/cuda/kernel/shape.h"

namespace ropewalk {

// shape.h computes these: the kernel, the plan and the check of the plan have them from there.
template <class K>
struct Shape {
  static constexpr rope_shape kShape =
      ShapeOf({kBytes<K::kDtype>, K::kHeadDim, K::kRotaryDim, K::kRotaryOffset, K::kVDim, K::kVector, K::kLanes,
               K::kInFlight, K::kFlat, K::kThreads, K::kTokenGroups, K::kPacked, K::kFewTokens != 0,
               K::kInterleaved != 0, K::kNorm || K::kOutOfPlace || K::kStoreK, K::kStoreK != 0, K::kStoreV != 0,
               K::kCacheDtype != K::kDtype});
  static constexpr bool kTable = K::kTableDtype != kRopeNoDtype;
  static constexpr bool kReference = K::kRounding == kRopeRoundReference;
  static constexpr bool kStores = K::kCacheDtype != kRopeNoDtype;
  static constexpr bool kPairsInside = kShape.pairs_inside;
  static constexpr int kVectorBytes = K::kVector * kBytes<K::kDtype>;
  static constexpr int kUnits = kShape.units;
  static constexpr int kUnitsPerLane = kShape.units_per_lane;
  static constexpr int kBefore = kShape.before;
  static constexpr int kRest = kShape.rest;
  static constexpr int kRestPerLane = kShape.rest_per_lane;
  static constexpr bool kStaged = kShape.staged;
  static constexpr bool kFlat = kShape.flat;
  static constexpr bool kAdjacent = kShape.adjacent;
  static constexpr int kRun = kShape.run;
  static constexpr rope_grid kGrid = kShape.grid;
  static constexpr int kRounds = kGrid.rounds;
  static constexpr int kWarpShare = WarpShare(kGrid);
  static constexpr int kWarpTokens = WarpTokens(kGrid);
  static constexpr int kBlockTokens = BlockTokens(kGrid);
  static constexpr int kWarpHeads = WarpHeads(kGrid);
  static constexpr int kHeadsAtOnce = HeadsAtOnce(kGrid);
  static constexpr bool kIdleThreads = GroupsPerWarp(kGrid) * K::kLanes != 32;
  static constexpr int kBlockHeads = kShape.block_heads;
  static constexpr int kSpanBegin = kShape.span_begin;
  static constexpr int kSpan = kShape.span;
  static constexpr int kSpanBytes = kShape.span_bytes;
  static constexpr int kCopies = kSpanBytes / 16;  // of one head
  static constexpr int kCopiesPerLane = (kWarpHeads * kCopies + 31) / 32;
  static constexpr bool kLinear = kShape.linear;
  static constexpr bool kVRides = kShape.v_rides;
  static constexpr bool kVInLine = kVRides && kLinear && K::kPacked == 2;  // v's heads follow k's
  static constexpr bool kStagedCodes = kShape.staged_codes;
  static constexpr int kStageBytes = kShape.stage_bytes;
};

// A unit: the first element of its first vector, the distance from there to its second vector, and the number of its
// i-th pair in the head, i < kVector.
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

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_CUH_
