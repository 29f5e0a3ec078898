// The one parameter of the kernels of the gradient. Read by g++, nvcc and NVRTC.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_

#include "backends/cuda/kernel/args.h"

// A warp takes so many turns, which lie together in memory, before the next warp's begin.
ROPEWALK_HOST_DEVICE constexpr int RopePieceTurns(bool flat) { return flat ? 8 : 2; }

// A block adds up so many elements of a weight's gradient: 32 bytes, which memory is read in. A row of sums has whole
// ones.
constexpr int kRopeSumsThreads = 256, kRopeSumsElements = 8;
ROPEWALK_HOST_DEVICE constexpr int RopeSumsRow(int head_dim) {
  return (head_dim + kRopeSumsElements - 1) / kRopeSumsElements * kRopeSumsElements;
}

typedef struct {
  rope_cuda_args turn;  // q and k are dY, q_out and k_out dX; the rotation is the other way round
  const void* q;        // x, before the norm
  const void* k;
  rope_strides q_strides, k_strides;
  float* sums;  // of each block: RopeSumsRow floats, and as many with what those lack; 32-byte aligned; null: no
                // weight's gradient is wanted
  float* q_weight_grad;
  float* k_weight_grad;
  rw_i32 q_blocks, k_blocks;  // the first ones have heads of q, those behind heads of k
} rope_backward_cuda_args;

#if defined(__cplusplus)
static_assert(sizeof(rope_backward_cuda_args) == sizeof(rope_cuda_args) + 5 * 8 + 6 * 8 + 8,
              "rope_backward_cuda_args must have one layout");
#endif

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_
