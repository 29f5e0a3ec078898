// The arithmetic on a head: the norm and the rotation.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_MATH_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_MATH_CUH_

#include "backends/cuda/kernel/shape.cuh"

namespace ropewalk {

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

// A variant whose products are not rounded: reference rounding rounds cosines and sines alone in the gradient.
template <class K>
struct Unrounded : K {
  static constexpr int kRounding = kRopeRoundFused;
};

// The weights for a vector, as loaded.
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

// 1 / sqrt of a mean that holds eps already. If eps is a normal number the mean is none of the subnormal ones, which
// the faster instruction takes for zero.
template <rw_u32 kEpsBits>
__device__ __forceinline__ float InverseRoot(float mean) {
  if constexpr (kEpsBits < 0x00800000u) return rsqrtf(mean);
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(mean));
  return r;
}

// The sum of `value` over the lanes of a group; every lane gets it. All lanes of the warp must call this. If kLanes is
// no power of two, a lane adds up runs of lanes that follow it round the group, one run for each bit of kLanes: 5 lanes
// are a run of 1 and a run of 4.
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
  float sum = 0.0f, run = value;  // over `done` lanes from this one on; over `size` of them
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

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_MATH_CUH_
