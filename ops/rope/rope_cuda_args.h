// The one parameter of the CUDA kernel: the tensors in order, then the params. Read by g++, nvcc and NVRTC.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_OPS_ROPE_ROPE_CUDA_ARGS_H_
#define ROPEWALK_OPS_ROPE_ROPE_CUDA_ARGS_H_

#include "ops/rope/rope_fault.h"
#include "ops/rope/rope_params.h"

typedef struct {
  void* q;
  void* k;
  const void* positions;
  const void* offsets;
  const void* cos;
  const void* sin;
  const int* axes;          // of the caller or of the frequencies, on the device
  const rw_u64* turns;      // of the frequencies, on the device
  const void* q_weight;
  const void* k_weight;
  void* q_out;
  void* k_out;
  const void* v;
  void* k_cache;
  void* v_cache;
  const void* slots;
  const float* k_scale;
  const float* v_scale;
  rope_fault* fault;
  rope_params params;
} rope_cuda_args;

#if defined(__cplusplus)
static_assert(sizeof(rope_cuda_args) == 19 * 8 + ROPE_PARAMS_SIZE, "rope_cuda_args must have one layout");
#endif

#endif  // ROPEWALK_OPS_ROPE_ROPE_CUDA_ARGS_H_
