// Compiles the kernel once for each target. Which targets there are: SSE4 is the least on x86 (this file is compiled
// with -msse4.2), NEON on Arm. Highway's headers only: the choice at run time is ours, so that nothing is linked.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backends/cpu/dispatch.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backends/cpu/kernel/backward-inl.h"
#include "backends/cpu/kernel/rope-inl.h"

#if HWY_ONCE
#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace ropewalk {
namespace {

#if HWY_ARCH_X86
bool HasSse4() { return __builtin_cpu_supports("sse4.2"); }
bool HasAvx2() {
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("bmi");
}
bool HasAvx3() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd");
}
bool HasAvx3Bf16() {
  unsigned a, b, c, d;
  return HasAvx3() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

constexpr CpuTarget kTargets[] = {
    {"avx3_bf16", HasAvx3Bf16, N_AVX3::ChooseBf16Kernel, N_AVX3::BackwardRowsBf16},
    {"avx3", HasAvx3, N_AVX3::ChooseKernel, N_AVX3::BackwardRows},
    {"avx2", HasAvx2, N_AVX2::ChooseKernel, N_AVX2::BackwardRows},
    {"sse4", HasSse4, N_SSE4::ChooseKernel, N_SSE4::BackwardRows},
};
#else
constexpr CpuTarget kTargets[] = {{"neon", [] { return true; }, N_NEON::ChooseKernel, N_NEON::BackwardRows}};
#endif

}  // namespace

std::span<const CpuTarget> CpuTargets() { return kTargets; }

}  // namespace ropewalk
#endif  // HWY_ONCE
