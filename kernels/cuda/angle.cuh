// The cosine and sine of a phase: a turn is 2^32.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_KERNELS_CUDA_ANGLE_CUH_
#define ROPEWALK_KERNELS_CUDA_ANGLE_CUH_

#include "kernels/kernel_types.h"

namespace ropewalk {

// The hardware's sine of the phase: the pair errs by 2^-21.07 at most over all 2^32 phases. Enough for 16-bit tensors.
__device__ __forceinline__ void FastCosSin(rw_u32 phase, float& cosine, float& sine) {
  const float angle = static_cast<float>(static_cast<int>(phase)) * 1.46291807926715968e-9f;  // 2 pi / 2^32
  cosine = __cosf(angle);
  sine = __sinf(angle);
}

// Reduced to an eighth of a turn on either side, then polynomials: errs by about 2^-24. The same as on the CPU.
__device__ __forceinline__ void AccurateCosSin(rw_u32 phase, float& cosine, float& sine) {
  const rw_u32 quadrant = (phase + (1u << 29)) >> 30;
  const float x = static_cast<float>(static_cast<int>(phase - (quadrant << 30))) * 1.46291807926715968e-9f;
  const float x2 = x * x;
  float s = fmaf(fmaf(-0.00019495635934f, x2, 0.0083319786936f), x2, -0.16666650772f);
  s = fmaf(s * x2, x, x);
  float c = fmaf(fmaf(2.4438451874e-05f, x2, -0.0013887367677f), x2, 0.041666645557f);
  c = fmaf(fmaf(c, x2, -0.5f), x2, 1.0f);
  const float a = quadrant & 1 ? s : c, b = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -a : a;
  sine = quadrant & 2 ? -b : b;
}

}  // namespace ropewalk

#endif  // ROPEWALK_KERNELS_CUDA_ANGLE_CUH_
