// The one parameter of the CUDA kernel: the tensors, then the params. Read by g++, nvcc and NVRTC.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_ARGS_H_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_ARGS_H_

#include "rope/fault.h"
#include "rope/params.h"

// In the order of use. A line of the constant cache holds eight pointers, and in a kernel of a microsecond each line
// that is touched is a miss that counts. Rope needs the first line, a store the second, a table the third.
typedef struct {
  void* q;
  void* k;
  const void* positions;
  const rw_u64* turns;  // of the frequencies, on the device
  const void* q_weight;
  const void* k_weight;

  const void* slots;
  rw_i64 slot_count;  // of the caches
  void* k_cache;
  const void* v;
  void* v_cache;
  const float* k_scale;
  const float* v_scale;
  float k_inverse_scale;  // of the value, used where the pointer is null
  float v_inverse_scale;

  const void* cos;
  const void* sin;
  rw_i64 rows;  // of the table
  void* q_out;
  void* k_out;
  const void* offsets;
  const int* axes;  // of the caller or of the frequencies, on the device
  rope_fault* fault;
  rope_params params;
} rope_cuda_args;

#if defined(__cplusplus)
static_assert(sizeof(rope_cuda_args) == 22 * 8 + ROPE_PARAMS_SIZE, "rope_cuda_args must have one layout");
#endif

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_ARGS_H_
