// Vectors of floats: loads and stores of a whole vector in one access, and conversions from and to float32. They are
// written here so that the kernel needs no header of the CUDA toolkit.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_VECTOR_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_VECTOR_CUH_

#include "rope/kernel_types.h"
#include "rope/params.h"

namespace ropewalk {

typedef unsigned short rw_u16;
typedef unsigned char rw_u8;

template <int kDtype>
constexpr int kBytes = kDtype == kRopeF32 || kDtype == kRopeI32                        ? 4
                       : kDtype == kRopeI64                                            ? 8
                       : kDtype == kRopeE4M3 || kDtype == kRopeE5M2 || kDtype == 0 ? 1
                                                                                       : 2;

// `kSize` bytes in registers. In memory they are aligned for the widest access that divides them.
template <int kSize>
constexpr int kWordAlign = kSize % 16 == 0 ? 16 : kSize % 8 == 0 ? 8 : 4;
template <int kSize>
struct alignas(kWordAlign<kSize>) Words {
  static constexpr int kCount = (kSize + 3) / 4;
  rw_u32 w[kCount];
};

// Loads from rows of q, k and v. They are read once and written once, so they need not stay in L1.
template <int kSize>
__device__ __forceinline__ Words<kSize> Load(const void* p) {
  Words<kSize> r;
  if constexpr (kSize == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
                 : "l"(p));
  } else if constexpr (kSize == 8) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
  } else if constexpr (kSize == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p));
  } else if constexpr (kSize == 2) {
    rw_u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
    r.w[0] = v;
  } else {
    r.w[0] = *static_cast<const rw_u8*>(p);
  }
  return r;
}

// A place in shared memory for one vector.
template <int kSize>
struct alignas(kWordAlign<kSize>) Aligned {
  Words<kSize> words;
};

// Copies 4, 8 or 16 bytes from global to shared memory, through no register. The copy is done after
// cp.async.wait_group.
template <int kSize, class Place>
__device__ __forceinline__ void CopyAsync(Place* to, const void* from) {
  const auto address = static_cast<rw_u32>(__cvta_generic_to_shared(to));
  if constexpr (kSize == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kSize) : "memory");
  }
}

// Loads weights and entries of tables. Many tokens or heads share them, so they may stay in L1.
template <int kSize>
__device__ __forceinline__ Words<kSize> LoadShared(const void* p) {
  Words<kSize> r;
  constexpr int kPart = kWordAlign<kSize>;
  if constexpr (kSize > kPart) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) {
      const Words<kPart> part = LoadShared<kPart>(static_cast<const char*>(p) + i * kPart);
#pragma unroll
      for (int j = 0; j < kPart / 4; ++j) r.w[i * (kPart / 4) + j] = part.w[j];
    }
  } else if constexpr (kSize == 16) {
    const uint4 a = __ldg(static_cast<const uint4*>(p));
    r.w[0] = a.x, r.w[1] = a.y, r.w[2] = a.z, r.w[3] = a.w;
  } else if constexpr (kSize == 8) {
    const uint2 a = __ldg(static_cast<const uint2*>(p));
    r.w[0] = a.x, r.w[1] = a.y;
  } else if constexpr (kSize == 4) {
    r.w[0] = __ldg(static_cast<const unsigned int*>(p));
  } else {
    r.w[0] = __ldg(static_cast<const unsigned short*>(p));
  }
  return r;
}

template <int kSize>
__device__ __forceinline__ void Store(void* p, const Words<kSize>& r) {
  if constexpr (kSize == 16) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(r.w[0]), "r"(r.w[1]),
                 "r"(r.w[2]), "r"(r.w[3])
                 : "memory");
  } else if constexpr (kSize == 8) {
    asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(r.w[0]), "r"(r.w[1]) : "memory");
  } else if constexpr (kSize == 4) {
    *static_cast<rw_u32*>(p) = r.w[0];
  } else if constexpr (kSize % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) static_cast<rw_u16*>(p)[i] = static_cast<rw_u16>(r.w[i / 2] >> i % 2 * 16);
  } else {
    static_assert(kSize == 1, "no odd number of bytes");
    *static_cast<rw_u8*>(p) = static_cast<rw_u8>(r.w[0]);
  }
}

// Stores if that is `wanted`, under a predicate and without a branch.
#define ROPEWALK_IF(WANTED, ACCESS) "{ .reg .pred p; setp.ne.u32 p, " WANTED ", 0; @p " ACCESS "; }"
template <int kSize>
__device__ __forceinline__ void StoreIf(bool wanted, void* p, const Words<kSize>& r) {
  const rw_u32 flag = wanted;
  if constexpr (kSize == 16) {
    asm volatile(ROPEWALK_IF("%5", "st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4}") ::"l"(p), "r"(r.w[0]),
                 "r"(r.w[1]), "r"(r.w[2]), "r"(r.w[3]), "r"(flag)
                 : "memory");
  } else if constexpr (kSize == 8) {
    asm volatile(ROPEWALK_IF("%3", "st.global.L1::no_allocate.v2.u32 [%0], {%1,%2}") ::"l"(p), "r"(r.w[0]),
                 "r"(r.w[1]), "r"(flag)
                 : "memory");
  } else if constexpr (kSize == 4) {
    asm volatile(ROPEWALK_IF("%2", "st.global.u32 [%0], %1") ::"l"(p), "r"(r.w[0]), "r"(flag) : "memory");
  } else if constexpr (kSize == 2) {
    asm volatile(ROPEWALK_IF("%2", "st.global.u16 [%0], %1") ::"l"(p), "h"(static_cast<rw_u16>(r.w[0])), "r"(flag)
                 : "memory");
  } else {
    if (wanted) Store(p, r);
  }
}

__device__ __forceinline__ float HalfToFloat(rw_u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<rw_u16>(bits)));
  return f;
}

// Two floats as 16-bit ones in one register, the first in the lower half.
template <int kDtype>
__device__ __forceinline__ rw_u32 PackPair(float low, float high) {
  rw_u32 r;
  if constexpr (kDtype == kRopeBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

// A float as fp8, for devices that lack the instruction. Rounds to nearest even and saturates; NaN stays NaN.
template <int kDtype>
__device__ __forceinline__ rw_u32 EncodeFp8(float v) {
  constexpr int kMantissa = kDtype == kRopeE4M3 ? 3 : 2, kBias = kDtype == kRopeE4M3 ? 7 : 15;
  constexpr rw_u32 kTop = kDtype == kRopeE4M3 ? 0x7e : 0x7b;
  constexpr int kDrop = 23 - kMantissa;
  const rw_u32 bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
  const rw_u32 magic = static_cast<rw_u32>(127 + 1 - kBias + kDrop) << 23;
  rw_u32 code = (magnitude + ((1u << (kDrop - 1)) - 1) + ((magnitude >> kDrop) & 1u) -
                 (static_cast<rw_u32>(127 - kBias) << 23)) >> kDrop;
  if (magnitude < static_cast<rw_u32>(128 - kBias) << 23) {
    code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), __uint_as_float(magic))) - magic;
  }
  code = code < kTop ? code : kTop;
  if (magnitude > 0x7f800000u) code = 0x7f;
  return code | (bits >> 31 << 7);
}

template <int kDtype>
__device__ __forceinline__ rw_u32 PackFp8Pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  rw_u16 r;
  if constexpr (kDtype == kRopeE4M3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  }
  return r;
#else
  return EncodeFp8<kDtype>(low) | EncodeFp8<kDtype>(high) << 8;
#endif
}

template <int kDtype, int kCount>
__device__ __forceinline__ void Unpack(const Words<kBytes<kDtype> * kCount>& r, float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kDtype == kRopeF32) {
      v[i] = __uint_as_float(r.w[i]);
    } else if constexpr (kDtype == kRopeBF16) {
      v[i] = __uint_as_float(i % 2 ? r.w[i / 2] & 0xffff0000u : r.w[i / 2] << 16);
    } else {
      v[i] = HalfToFloat(i % 2 ? r.w[i / 2] >> 16 : r.w[i / 2] & 0xffffu);
    }
  }
}

template <int kDtype, int kCount>
__device__ __forceinline__ Words<kBytes<kDtype> * kCount> Pack(const float (&v)[kCount]) {
  Words<kBytes<kDtype> * kCount> r;
  if constexpr (kDtype == kRopeF32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) r.w[i] = __float_as_uint(v[i]);
  } else if constexpr (kDtype == kRopeE4M3 || kDtype == kRopeE5M2) {
#pragma unroll
    for (int i = 0; i < Words<kCount>::kCount; ++i) {
      const auto at = [&](int j) { return 4 * i + j < kCount ? v[4 * i + j] : 0.0f; };
      r.w[i] = PackFp8Pair<kDtype>(at(0), at(1));
      if constexpr (kCount > 2) r.w[i] |= PackFp8Pair<kDtype>(at(2), at(3)) << 16;
    }
  } else if constexpr (kCount == 1) {
    r.w[0] = PackPair<kDtype>(v[0], 0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) r.w[i] = PackPair<kDtype>(v[2 * i], v[2 * i + 1]);
  }
  return r;
}

// To the dtype and back. Reference rounding does this where the model's own code rounds.
template <int kDtype>
__device__ __forceinline__ float RoundTo(float v) {
  if constexpr (kDtype == kRopeF32) return v;
  const rw_u32 r = PackPair<kDtype>(v, 0.0f);
  if constexpr (kDtype == kRopeBF16) return __uint_as_float(r << 16);
  return HalfToFloat(r & 0xffffu);
}

template <int kDtype>
__device__ __forceinline__ float LoadFloat(const void* p, rw_i64 index) {
  if constexpr (kDtype == kRopeF32) return __ldg(static_cast<const float*>(p) + index);
  const rw_u32 bits = __ldg(static_cast<const unsigned short*>(p) + index);
  if constexpr (kDtype == kRopeBF16) return __uint_as_float(bits << 16);
  return HalfToFloat(bits);
}

// An integer of the caller's as it lies in memory, and widened. A kernel loads positions and slots, lets the next
// kernel start and widens then: the other way round the next one would wait for the loads. The asm keeps this order.
template <int kDtype>
struct IntOf {
  using Type = rw_i64;
};
template <>
struct IntOf<kRopeI32> {
  using Type = int;
};
template <int kDtype>
__device__ __forceinline__ typename IntOf<kDtype>::Type LoadInt(const void* p, rw_i64 index) {
  return static_cast<const typename IntOf<kDtype>::Type*>(p)[index];
}
__device__ __forceinline__ rw_i64 Widen(rw_i64 x) { return x; }
__device__ __forceinline__ rw_i64 Widen(int x) {
  rw_i64 wide;
  asm volatile("cvt.s64.s32 %0, %1;" : "=l"(wide) : "r"(x));
  return wide;
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_VECTOR_CUH_
