// The CUDA kernel. Begin here: what it computes, and a drawing of which thread works on what.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_ROPE_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_ROPE_CUH_

// It does this for each head v of each token:
//
//   v = v * weight / sqrt(mean(v * v) + eps)           the norm                 (math.cuh)
//   (x, y) = (x cos - y sin, y cos + x sin)            each pair of v rotates   (math.cuh; its angle: angles.cuh)
//   row[head] = v, cache[slot][head] = v               the stores               (place.cuh)
//
// Each stage is on or off, and every dtype and size is known, when a variant is compiled: they are the constants of
// `K`, which backends/cuda/plan.cc writes. Comments are not part of the text that is compiled (cmake/embed.cmake).
//
// Who owns what of a head. A *group* of lanes works on one head at a time. A lane owns the same elements of every head,
// so it keeps their cosines and sines in registers for all heads of a token. It owns whole *units*: two vectors, x and
// y, half the rotated part apart. For example, a head of 16 in vectors of 4, and 2 lanes with one unit each:
//
//   element       0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
//   owner         lane 0, x  |  lane 1, x  |  lane 0, y  |  lane 1, y
//   halves        element i forms a pair with i + 8: x[j] with y[j] of the same lane
//   neighbours    element 2i forms a pair with 2i + 1: both are in x, or both in y
//
// Either way a pair has one owner, and only the sum of the norm goes from lane to lane. The *rest* of a head, which is
// not rotated, is cut into vectors of the same size, and the lanes take them in turn.
//
// Who works on which head. The three layouts differ in this, and in how a head gets to its group. For example, 20
// heads, two warps of 4 groups (group 5 is the second group of the second warp):
//
//   few      block (token, part)   group 5 of part 0 has head 5, of part 1 head 13, of part 2 none
//            (few.cuh)             all that a lane owns of its head goes straight to its registers
//   staged   block (token)         group 5 has head 5, then head 13
//            (staged.cuh)          what a lane owns goes through shared memory, a few heads ahead of the work
//   flat     block (token)         group 5 has head 5, then head 13, but its warp fetches heads 4 to 7 together: lane 0
//            (flat.cuh)            takes bytes 0 to 15 of the four, lane 1 bytes 16 to 31, and so on
//
// docs/cuda.md says why, and explains two more words: *odd* vectors, and v that *rides*. shape.h has the numbers of any
// such picture; reading on: shape.cuh, group.cuh, then a layout.

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
