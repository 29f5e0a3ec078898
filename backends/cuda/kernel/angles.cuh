// The cosines and sines of the pairs that a thread owns, loaded from a table or computed. They are the same for all
// heads of a token, and stay in the thread's registers.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_ANGLES_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_ANGLES_CUH_

#include "backends/cuda/kernel/sincos.cuh"
#include "backends/cuda/kernel/token.cuh"

namespace ropewalk {

// Loads the cosines and sines of one unit from the table.
template <class K>
__device__ __forceinline__ void LoadCosSin(const rope_cuda_args& a, const Token& t, rw_i64 position, int unit,
                                           float (&cos)[K::kVector], float (&sin)[K::kVector]) {
  const rope_params& p = a.params;
  // Entries of pairs that follow each other are loaded kStep at a time.
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

// Computes the cosines and sines of one unit.
template <class K>
__device__ __forceinline__ void ComputeCosSin(const rope_cuda_args& a, const Token& t, rw_i64 position, int unit,
                                              float (&cos)[K::kVector], float (&sin)[K::kVector]) {
  // The phase is position * turns modulo 2^64, where 2^64 is a whole turn: the product of unsigned integers just is
  // that. Its upper 32 bits are all that a float32 can tell apart. The turns of pairs that follow each other are loaded
  // two at a time.
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

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_ANGLES_CUH_
