// Integer types of one size on every compiler that reads device code: g++, clang, nvcc, NVRTC, OpenCL C.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPE_KERNEL_TYPES_H_
#define ROPEWALK_ROPE_KERNEL_TYPES_H_

typedef int rw_i32;
typedef unsigned int rw_u32;
#if defined(__OPENCL_VERSION__) || defined(__OPENCL_C_VERSION__)
typedef long rw_i64;
typedef unsigned long rw_u64;
#else
typedef long long rw_i64;
typedef unsigned long long rw_u64;
#endif

// Functions that the host and a CUDA device both call.
#if defined(__CUDACC__)
#define ROPEWALK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ROPEWALK_HOST_DEVICE inline
#endif

#endif  // ROPEWALK_ROPE_KERNEL_TYPES_H_
