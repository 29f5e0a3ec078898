// The gradient of norm and rotation. With n = x / rms, y = R (n * w) and g = R^T dY:
//
//   dX = (g w - n mean(g w n)) / rms                   one pass: reads x and dY, writes dX
//   dW = sum of g n over all heads of all tokens       two kernels: a sum of each block, then those added up
//
// A block has heads of q or of k, not of both, so that its threads add up one weight's gradient, in their registers. A
// warp takes a token at a time, the next one as many tokens behind as all warps of q, or of k, take at once; its groups
// share the heads. Who owns what of a head, rope.cuh draws. No sum depends on which block is first.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/kernel/group.cuh"

namespace ropewalk {

// high + low, with twice the bits of a float.
struct Sum {
  float high, low;
};
__device__ __forceinline__ void AddTo(Sum& sum, float value) {
  const float total = __fadd_rn(sum.high, value);
  const float of_value = __fsub_rn(total, sum.high);
  const float lost = __fadd_rn(__fsub_rn(sum.high, __fsub_rn(total, of_value)), __fsub_rn(value, of_value));
  sum.high = total;
  sum.low = __fadd_rn(sum.low, lost);
}
__device__ __forceinline__ void AddTo(Sum& sum, const Sum& other) {
  AddTo(sum, other.high);
  sum.low = __fadd_rn(sum.low, other.low);
}

// A variant whose products are not rounded: reference rounding rounds cosines and sines alone here.
template <class K>
struct Unrounded : K {
  static constexpr int kRounding = kRopeRoundFused;
};

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

// Adds up the sums of a block's threads, and leaves them at `out`, where head_dim floats lie and as many behind. Each
// warp in its turn, so that the order is always the same.
template <class K>
__device__ __forceinline__ void AddUpBlock(int lane, bool owns, Sum (&sums)[Floats<K>::kCount][K::kVector], float* out) {
  constexpr int kPart = K::kHeadDim < 2048 ? K::kHeadDim : 2048, kWarps = K::kThreads / 32;
  constexpr int kGroups = 32 / K::kLanes;
  __shared__ Sum total[kPart];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // Of the groups of a warp, in their order; every thread gets it, and those of the first group own it.
#pragma unroll
  for (int i = 0; i < Floats<K>::kCount; ++i) {
#pragma unroll
    for (int j = 0; j < K::kVector; ++j) {
      Sum all = {0.0f, 0.0f};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int from = lane + group * K::kLanes;
        AddTo(all, Sum{__shfl_sync(0xffffffffu, sums[i][j].high, from), __shfl_sync(0xffffffffu, sums[i][j].low, from)});
      }
      sums[i][j] = all;
    }
  }
  const bool first = owns && static_cast<int>(threadIdx.x) % 32 < K::kLanes;
#pragma unroll 1
  for (int begin = 0; begin < K::kHeadDim; begin += kPart) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kPart; i += K::kThreads) total[i] = {0.0f, 0.0f};
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      __syncthreads();
      if (warp != turn || !first) continue;
      Share<K> places;
      EachVector<K>(lane, places, [&](Words<Shape<K>::kVectorBytes>&, int at, int number) {
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          const int place = at + j - begin;
          if (place >= 0 && place < kPart) AddTo(total[place], sums[number][j]);
        }
      });
    }
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kPart && begin + i < K::kHeadDim; i += K::kThreads) {
      out[begin + i] = total[i].high;
      out[K::kHeadDim + begin + i] = total[i].low;
    }
    __syncthreads();
  }
}

template <class K>
__device__ __forceinline__ void BackwardBody(const rope_backward_cuda_args& b) {
  using S = Shape<K>;
  static_assert(Deals(S::kGrid) && S::kWarpTokens == 1 && TokenWarps(S::kGrid) == 1, "a warp has a token of its own");
  static_assert(!S::kStaged && K::kQHeads == 0, "a thread loads what it owns by itself, and strides are not constants");
  constexpr int kSize = kBytes<K::kDtype>, kStep = S::kWarpShare;
  const rope_cuda_args& a = b.turn;
  const rope_params& p = a.params;
  const bool of_k = static_cast<int>(blockIdx.x) >= b.q_blocks;
  const int heads = of_k ? p.k_heads : p.q_heads;
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32 % K::kLanes;
  const bool idle = Idle(S::kGrid, thread);
  const int first = idle ? 1 << 30 : GroupInWarp(S::kGrid, thread);

  ShareWeights<K> weights;
  LoadWeights<K>(of_k ? a.k_weight : a.q_weight, lane, weights);
  Sum sums[K::kSums ? Floats<K>::kCount : 1][K::kVector];
  if constexpr (K::kSums != 0) {
#pragma unroll
    for (int i = 0; i < Floats<K>::kCount; ++i) {
#pragma unroll
      for (int j = 0; j < K::kVector; ++j) sums[i][j] = {0.0f, 0.0f};
    }
  }

  constexpr int kWarps = K::kThreads / 32;
  const rw_i64 rows = p.batch * p.tokens;
  const rw_i64 block = of_k ? static_cast<int>(blockIdx.x) - b.q_blocks : static_cast<int>(blockIdx.x);
  const rw_i64 step = rw_i64{of_k ? b.k_blocks : b.q_blocks} * kWarps;
#pragma unroll 1
  for (rw_i64 row = block * kWarps + thread / 32; row < rows; row += step) {
    Token t = BeginToken<K>(a, row);
    const auto place = [&](const void* data, const rope_strides& s, int h) {
      return static_cast<const char*>(data) + Offset<K>(s, t.batch, t.token, h) * kSize;
    };
    const auto out_of = [&](int h) {
      return const_cast<char*>(of_k ? place(a.k_out, p.k_out, h) : place(a.q_out, p.q_out, h));
    };
    Share<K> x, grad;
    const auto fetch = [&](int h) {
      if (h >= heads) return;
      const char* const from_x = of_k ? place(b.k, b.k_strides, h) : place(b.q, b.q_strides, h);
      const char* const from_grad = of_k ? place(a.k, p.k, h) : place(a.q, p.q, h);
      EachVector<K>(lane, x, [&](Words<S::kVectorBytes>& words, int begin, int) {
        words = Load<S::kVectorBytes>(from_x + begin * kSize);
      });
      EachVector<K>(lane, grad, [&](Words<S::kVectorBytes>& words, int begin, int) {
        words = Load<S::kVectorBytes>(from_grad + begin * kSize);
      });
    };
    fetch(first);
    const rw_i64 position = K::kAxes ? 0 : PositionOf<K>(a, t.batch, t.token, 0);
    CheckToken<K>(a, row, -1, position, thread % 32 == 0 && (!of_k || p.q_heads == 0), t);
    if ((S::kTable || K::kCheckAxes) && t.poisoned) {
#pragma unroll 1
      for (int h = first; h < heads; h += kStep) FillHead<K>(nullptr, out_of(h), true, lane);
      continue;
    }
    Angles<K> angles;
    FindAngles<K>(a, t, position, lane, true, angles);

    // All threads of a warp go on to the last turn: they meet at the sums of a head.
#pragma unroll 1
    for (int turn = 0, h = first; turn < heads; turn += kStep, h += kStep) {
      Floats<K> n, g;
      float square = 0.0f, along = 0.0f;
      const auto unpack = [&](const Words<S::kVectorBytes>& words, int, int number) {
        Unpack<K::kDtype, K::kVector>(words, n.v[number]);
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) square = fmaf(n.v[number][j], n.v[number][j], square);
      };
      EachVector<K>(lane, x, unpack);
      EachVector<K>(lane, grad, [&](const Words<S::kVectorBytes>& words, int, int number) {
        Unpack<K::kDtype, K::kVector>(words, g.v[number]);
      });
      fetch(h + kStep);
#pragma unroll
      for (int i = 0; i < S::kUnitsPerLane; ++i) {
        if (HasUnit<K>(lane, i)) {
          RotateUnit<Unrounded<K>>(g.v[2 * i], g.v[2 * i + 1], angles.cos[i], angles.sin[i]);
        }
      }
      // The weights of a vector, unpacked twice: kept as floats they would take the registers of a vector more.
      const auto factor_of = [&](const WeightWords<K>& words, float (&w)[K::kVector]) {
        if constexpr (K::kWeight != kRopeNoWeight) Unpack<K::kWeightDtype, K::kVector>(words, w);
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          w[j] = K::kWeight == kRopeNoWeight ? 1.0f : K::kWeight == kRopeWeight ? w[j] : 1.0f + w[j];
        }
      };
      EachVector<K>(lane, weights, [&](const WeightWords<K>& words, int, int number) {
        float w[K::kVector];
        factor_of(words, w);
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) along = fmaf(g.v[number][j] * w[j], n.v[number][j], along);
      });
      const float mean =
          SumOfGroup<K::kLanes>(square, lane) * (1.0f / K::kHeadDim) + __uint_as_float(K::kEpsBits);
      const float rstd = K::kDtype == kRopeF32 ? __frcp_rn(__fsqrt_rn(mean)) : InverseRoot<K::kEpsBits>(mean);
      const float mean_along = SumOfGroup<K::kLanes>(along, lane) * (1.0f / K::kHeadDim) * rstd;
      if (h >= heads) continue;
      char* const out = out_of(h);
      EachVector<K>(lane, weights, [&](const WeightWords<K>& words, int begin, int number) {
        float dx[K::kVector];
        factor_of(words, dx);
#pragma unroll
        for (int j = 0; j < K::kVector; ++j) {
          const float unit = n.v[number][j] * rstd;
          dx[j] = rstd * fmaf(-unit, mean_along, g.v[number][j] * dx[j]);
          if constexpr (K::kSums != 0) AddTo(sums[number][j], g.v[number][j] * unit);
        }
        Store(out + begin * kSize, Pack<K::kDtype, K::kVector>(dx));
      });
    }
  }
  if constexpr (K::kSums != 0) {
    AddUpBlock<K>(lane, !idle, sums, b.sums + static_cast<rw_i64>(blockIdx.x) * (2 * K::kHeadDim));
  }
}

// Adds up the blocks' sums: a warp for each element of a weight's gradient, those of q first where that is wanted.
__device__ __forceinline__ void SumsBody(const rope_backward_cuda_args& b) {
  const int head_dim = b.turn.params.head_dim, thread = static_cast<int>(threadIdx.x);
  const int number = static_cast<int>(blockIdx.x), element = number % head_dim;
  const bool of_k = !b.q_weight_grad || number >= head_dim;
  const int begin = of_k ? b.q_blocks : 0, count = of_k ? b.k_blocks : b.q_blocks;
  const float* const from = b.sums + rw_i64{begin} * (2 * head_dim) + element;
  Sum sum = {0.0f, 0.0f};
  for (int i = thread; i < count; i += 32) {
    const float* const at = from + rw_i64{i} * (2 * head_dim);
    AddTo(sum, Sum{at[0], at[head_dim]});
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    // The same sum on both sides: the lower thread's comes first.
    const Sum other = {__shfl_xor_sync(0xffffffffu, sum.high, mask), __shfl_xor_sync(0xffffffffu, sum.low, mask)};
    Sum low = thread & mask ? other : sum;
    AddTo(low, thread & mask ? sum : other);
    sum = low;
  }
  if (thread == 0) (of_k ? b.k_weight_grad : b.q_weight_grad)[element] = sum.high + sum.low;
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_CUH_
