// The cosine and sine of a phase. A whole turn is 2^32.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_SINCOS_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_SINCOS_CUH_

#include "rope/kernel_types.h"
#include "rope/sincos.h"

namespace ropewalk {

// By the hardware's sine. The pair is off by at most 2^-21.07 over all 2^32 phases, which is enough for 16-bit tensors.
__device__ __forceinline__ void FastCosSin(rw_u32 phase, float& cosine, float& sine) {
  const float angle = static_cast<float>(static_cast<int>(phase)) * ROPE_ANGLE_OF_PHASE;
  cosine = __cosf(angle);
  sine = __sinf(angle);
}

// By polynomials, after the phase is reduced to an eighth of a turn on either side of zero. Off by about 2^-24. The CPU
// computes the same.
__device__ __forceinline__ void AccurateCosSin(rw_u32 phase, float& cosine, float& sine) {
  const rw_u32 quadrant = (phase + (1u << 29)) >> 30;
  const float x = static_cast<float>(static_cast<int>(phase - (quadrant << 30))) * ROPE_ANGLE_OF_PHASE;
  const float x2 = x * x;
  float s = fmaf(fmaf(ROPE_SIN7, x2, ROPE_SIN5), x2, ROPE_SIN3);
  s = fmaf(s * x2, x, x);
  float c = fmaf(fmaf(ROPE_COS8, x2, ROPE_COS6), x2, ROPE_COS4);
  c = fmaf(fmaf(c, x2, -0.5f), x2, 1.0f);
  const float a = quadrant & 1 ? s : c, b = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -a : a;
  sine = quadrant & 2 ? -b : b;
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_SINCOS_CUH_
