// The one parameter of the kernels of the gradient. Read by g++, nvcc and NVRTC.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_

#include "backends/cuda/kernel/args.h"

typedef struct {
  rope_cuda_args turn;  // q and k are dY, q_out and k_out dX; the rotation is the other way round
  const void* q;        // x, before the norm
  const void* k;
  rope_strides q_strides, k_strides;
  float*
      sums;  // of each block: head_dim floats, and as many with what those lack; null: no weight's gradient is wanted
  float* q_weight_grad;
  float* k_weight_grad;
  rw_i32 q_blocks, k_blocks;  // the first ones have heads of q, those behind heads of k
} rope_backward_cuda_args;

#if defined(__cplusplus)
static_assert(sizeof(rope_backward_cuda_args) == sizeof(rope_cuda_args) + 5 * 8 + 6 * 8 + 8,
              "rope_backward_cuda_args must have one layout");
#endif

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_BACKWARD_ARGS_H_
