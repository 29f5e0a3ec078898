// What CUDA C++ has and g++ has not, as far as our kernels use it: included in front of a kernel that emulated_nvrtc.cc
// compiles for the processor. What does more than plain C++ is in emulated_gpu.cc, and its tables of functions come
// with the launch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <math.h>
#include <string.h>

#include "tests/stand_ins/emulated_gpu/machine.h"

#define __CUDA_ARCH__ 900
#define ROPEWALK_CHECK_PLANS  // a plan that does not fit its call ends the process
#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

extern "C" __attribute__((visibility("default"))) EmulatedMachine* emulated_machine = nullptr;
#define threadIdx (emulated_machine->thread)
#define blockIdx (emulated_machine->block)
#define gridDim (emulated_machine->grid)

// An instruction of PTX and its operands, %0 first.
template <class... T>
inline void EmulatedPtx(const char* text, const T&... operands) {
  const EmulatedOperand all[] = {{const_cast<void*>(static_cast<const void*>(&operands)), sizeof(operands)}..., {}};
  emulated_machine->ptx(emulated_machine, text, all, sizeof...(operands));
}

template <class T>
inline T __ldg(const T* p) {
  emulated_machine->check_aligned(p, sizeof(T));
  return *p;
}
inline void __syncwarp() { emulated_machine->meet(emulated_machine, EMULATED_SYNC, 0, 0); }
inline void __syncthreads() { emulated_machine->meet(emulated_machine, EMULATED_BARRIER, 0, 0); }
template <class T>
inline T EmulatedShuffle(T value, int from) {
  static_assert(sizeof(T) == 4);
  unsigned bits;
  memcpy(&bits, &value, 4);
  bits = emulated_machine->meet(emulated_machine, EMULATED_SHUFFLE, bits, from);
  memcpy(&value, &bits, 4);
  return value;
}
inline float __shfl_sync(unsigned, float value, int from) { return EmulatedShuffle(value, from % 32); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return EmulatedShuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline unsigned long __cvta_generic_to_shared(const void* p) { return emulated_machine->shared_address(p); }

inline float __uint_as_float(unsigned v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float v) {
  unsigned u;
  memcpy(&u, &v, 4);
  return u;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline float __cosf(float a) { return cosf(a); }
inline float __sinf(float a) { return sinf(a); }

template <class T>
inline T atomicCAS(T* p, T compare, T value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
template <class T>
inline T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
inline void __threadfence() {}
inline void __trap() { __builtin_trap(); }
inline void __nanosleep(unsigned) {}
