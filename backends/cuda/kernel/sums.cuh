// The sums of a weight's gradient: of a thread and of a block, for backward.cuh, and of all blocks: the second kernel.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_SUMS_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_SUMS_CUH_

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/kernel/group.cuh"

namespace ropewalk {

// total - lost, with twice the bits of a float.
struct Sum {
  float total, lost;
};
// Adds up two sums, of which either may be the larger one.
__device__ __forceinline__ void AddTo(Sum& sum, const Sum& other) {
  const float total = __fadd_rn(sum.total, other.total);
  const float of_other = __fsub_rn(total, sum.total);
  const float lost = __fadd_rn(__fsub_rn(sum.total, __fsub_rn(total, of_other)), __fsub_rn(other.total, of_other));
  sum.total = total;
  sum.lost = __fsub_rn(__fadd_rn(sum.lost, other.lost), lost);
}
// Adds what is seldom the larger one: Kahan's.
__device__ __forceinline__ void AddTo(Sum& sum, float other) {
  const Sum before = sum;
  const float term = __fsub_rn(other, before.lost);
  const float total = __fadd_rn(before.total, term);
  sum = {total, __fsub_rn(__fsub_rn(total, before.total), term)};
}

// What a thread owns of a head as floats, vector by vector: x and y of each unit, then the rest.
template <class K>
struct Floats {
  static constexpr int kCount = 2 * Shape<K>::kUnitsPerLane + Shape<K>::kRestPerLane;
  float v[kCount][K::kVector];
};
template <class K, class Of, class What>
__device__ __forceinline__ void EachVector(int lane, Of& of, const What& what) {
  EachOfUnits<K>(lane, of, what);
  EachOfRest<K>(lane, of, what);
}

// The sums of a thread: one for each element that it owns. It adds up the terms of kRun heads in registers, which is off
// by 7 units at most, and then adds that to sums of twice the bits. Those are kept in shared memory where they fit.
template <class K>
struct Sums {
  static constexpr int kRun = 8;
  static constexpr int kSlots = Floats<K>::kCount * K::kVector;
  static constexpr int kRoom = 2048 / K::kThreads;  // slots of all threads in 16 KB
  static constexpr bool kShared = kSlots <= kRoom;
  static constexpr int kPart = kShared ? kSlots : kRoom;
};

// The element of a head that a lane keeps in a slot; -1 if there is none.
template <class K>
__device__ __forceinline__ int ElementOf(int lane, int slot) {
  const int number = slot / K::kVector, j = slot % K::kVector, i = number / 2;
  if (number < 2 * Shape<K>::kUnitsPerLane) {
    return HasUnit<K>(lane, i) ? UnitBegin<K>(UnitOf<K>(lane, i)) + number % 2 * kUnitDistance<K> + j : -1;
  }
  const int rest = number - 2 * Shape<K>::kUnitsPerLane;
  return HasRest<K>(lane, rest) ? RestBegin<K>(UnitOf<K>(lane, rest)) + j : -1;
}

// Adds up the blocks' sums: a block for kRopeSumsElements of a weight's gradient, those of q first where that is wanted.
// Its threads read rows of 32 bytes that lie together, two elements each: many blocks may be on few multiprocessors,
// those that had ended first. It does not let the next kernel start before it ends: on an H200 that one's blocks came to
// lie three on some multiprocessors and one on others, and took 3 us longer than on empty ones.
__device__ __forceinline__ void SumsBody(const rope_backward_cuda_args& b) {
  WaitForOthers();
  struct alignas(8) Two {
    float of[2];
  };
  constexpr int kThreadsOfRow = kRopeSumsElements / 2, kRows = kRopeSumsThreads / kThreadsOfRow;
  const int head_dim = b.turn.params.head_dim, thread = static_cast<int>(threadIdx.x);
  const int row_size = RopeSumsRow(head_dim), chunks = row_size / kRopeSumsElements;
  const auto number = static_cast<int>(blockIdx.x);
  const bool of_k = !b.q_weight_grad || number >= chunks;
  const int first = (number - (b.q_weight_grad && of_k ? chunks : 0)) * kRopeSumsElements;
  const int begin = of_k ? b.q_blocks : 0, count = of_k ? b.k_blocks : b.q_blocks;
  const float* const from = b.sums + rw_i64{begin} * (2 * row_size) + first + thread % kThreadsOfRow * 2;
  Sum sums[2] = {};
  constexpr int kTogether = 4;  // rows of a thread on their way
#pragma unroll 1
  for (int i = thread / kThreadsOfRow; i < count; i += kRows * kTogether) {
    Two total[kTogether], lost[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int block = i + kRows * j;
      const float* const at = from + rw_i64{block} * (2 * row_size);
      total[j] = lost[j] = {};
      if (block < count) {
        total[j] = *reinterpret_cast<const Two*>(at);
        lost[j] = *reinterpret_cast<const Two*>(at + row_size);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) AddTo(sums[e], {total[j].of[e], lost[j].of[e]});
    }
  }
#pragma unroll
  for (int mask = 16; mask >= kThreadsOfRow; mask /= 2) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // The same sum on both sides: the lower thread's comes first.
      Sum& sum = sums[e];
      const Sum other = {__shfl_xor_sync(0xffffffffu, sum.total, mask), __shfl_xor_sync(0xffffffffu, sum.lost, mask)};
      Sum low = thread & mask ? other : sum;
      AddTo(low, thread & mask ? sum : other);
      sum = low;
    }
  }
  __shared__ Sum of_warps[kRopeSumsThreads / 32][kRopeSumsElements];
  if (thread % 32 < kThreadsOfRow) {
#pragma unroll
    for (int e = 0; e < 2; ++e) of_warps[thread / 32][thread % 32 * 2 + e] = sums[e];
  }
  __syncthreads();
  if (thread >= kRopeSumsElements || first + thread >= head_dim) return;
  Sum sum = of_warps[0][thread];
#pragma unroll
  for (int warp = 1; warp < kRopeSumsThreads / 32; ++warp) AddTo(sum, of_warps[warp][thread]);
  (of_k ? b.k_weight_grad : b.q_weight_grad)[first + thread] = sum.total - sum.lost;
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_SUMS_CUH_
