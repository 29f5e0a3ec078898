// The CUDA kernel: every stage, dtype and size is a compile-time choice of `K` (written by backends/cuda/variant.cc). For each
// token: fetch a head, normalise it (v * weight / rms), rotate its pairs, (x, y) -> (x cos - y sin, y cos + x sin), write
// it back and store it. Three layouts say which threads do it; all else is shared.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_ROPE_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_ROPE_CUH_

#include "backends/cuda/kernel/few.cuh"
#include "backends/cuda/kernel/flat.cuh"
#include "backends/cuda/kernel/staged.cuh"

namespace ropewalk {

template <class K>
__device__ __forceinline__ void RopeBody(const rope_cuda_args& a) {
  if constexpr (K::kFewTokens) {
    FewTokens<K>(a);
  } else if constexpr (Shape<K>::kFlat) {
    Flat<K>(a);
  } else {
    Staged<K>(a);
  }
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_ROPE_CUH_
