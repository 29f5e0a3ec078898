// Part of rope-inl.h: the vectors of the CPU kernel, how they are rounded, and how a part of one is loaded and stored.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_VECTORS_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_VECTORS_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_VECTORS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "backends/cpu/dispatch.h"
#include "backends/cpu/row_plan.h"
#include "backends/cpu/scratch.h"
#include "rope/sincos.h"
// clang-format off
#include <hwy/highway.h>  // after dispatch.h, which says what targets there are
// clang-format on

// What each part begins with; and, for lambdas, which the attributes pushed do not reach, ROPEWALK_ATTR.
#undef ROPEWALK_BEFORE_KERNEL
#undef ROPEWALK_ATTR
#if HWY_TARGET == HWY_AVX3
// With the CPU's own bfloat16 rounding, which only the kernels of kNative use, and only CPUs that have it run those.
#define ROPEWALK_BEFORE_KERNEL HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#define ROPEWALK_ATTR __attribute__((always_inline, target(HWY_TARGET_STR ",avx512bf16")))
#else
#define ROPEWALK_BEFORE_KERNEL HWY_BEFORE_NAMESPACE();
#define ROPEWALK_ATTR __attribute__((always_inline)) HWY_ATTR
#endif

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using V = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr DF df;
constexpr DU du;
constexpr int kLanes = HWY_LANES(float);
constexpr int kBlock = 2 * kLanes;  // elements

// Integers beside the floats of D: as wide, two 16-bit ones for each, one 16-bit or 8-bit one for each.
template <class D>
using Unsigned = hn::RebindToUnsigned<D>;
template <class D>
using Words = hn::Repartition<uint16_t, D>;
template <class D>
using Halves = hn::Rebind<uint16_t, D>;
template <class D>
using Bytes = hn::Rebind<uint8_t, D>;
constexpr Words<DF> d16;

// Vectors of half the width, for tails: on AVX-512 CPUs whose units are 256 bits wide they take half the time.
#if HWY_TARGET == HWY_AVX3
constexpr bool kHasNarrow = true;
using DNarrow = hn::Half<DF>;
#else
constexpr bool kHasNarrow = false;
using DNarrow = DF;
#endif

// As wide as vectors of D.
template <class D>
HWY_INLINE hn::Vec<D> Narrowed(V v) {
  if constexpr (hn::MaxLanes(D()) == kLanes) {
    return v;
  } else {
    return hn::LowerHalf(D(), v);
  }
}

// The other way, with zeros.
template <class VF>
HWY_INLINE V Widened(VF v) {
  if constexpr (hn::MaxLanes(hn::DFromV<VF>()) == kLanes) {
    return v;
  } else {
    return hn::ZeroExtendVector(df, v);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parts of vectors. No byte outside them is read or written.

// All elements that vectors of D hold, or the first `count` of them. kReadAll: of which a load may read all, because
// the others belong to the same head.
template <class D_>
struct Whole {
  using D = D_;
};
template <class D_, bool kReadAll_ = false>
struct First {
  static constexpr bool kReadAll = kReadAll_;
  using D = D_;
  int count;  // below 64, of which a mask is made
#if HWY_TARGET == HWY_AVX3
  // Of the elements of a vector of DT from the `at`-th on.
  template <class DT>
  HWY_INLINE hn::Mask<DT> Inside(DT, int at) const {
    hn::Mask<DT> mask;
    mask.raw = static_cast<decltype(mask.raw)>(((uint64_t{1} << count) - 1) >> at);
    return mask;
  }
#endif
};

#if HWY_TARGET != HWY_AVX3
// 1 to 8 bytes as a number.
HWY_INLINE uint64_t LoadBytes(const uint8_t* p, int count) {
  if (count >= 4) {
    uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + count - 4, 4);
    return low | uint64_t{high} << (8 * (count - 4));  // what overlaps is the same
  }
  return p[0] | uint64_t{p[count / 2]} << (8 * (count / 2)) | uint64_t{p[count - 1]} << (8 * (count - 1));
}

HWY_INLINE void StoreBytes(uint64_t bytes, uint8_t* p, int count) {
  if (count >= 4) {
    const auto low = static_cast<uint32_t>(bytes), high = static_cast<uint32_t>(bytes >> (8 * (count - 4)));
    std::memcpy(p, &low, 4);
    std::memcpy(p + count - 4, &high, 4);
    return;
  }
  p[0] = static_cast<uint8_t>(bytes);
  p[count / 2] = static_cast<uint8_t>(bytes >> (8 * (count / 2)));
  p[count - 1] = static_cast<uint8_t>(bytes >> (8 * (count - 1)));
}

// 1 to all bytes of a vector of up to 32.
template <class D8>
HWY_INLINE hn::Vec<D8> LoadFirstBytes(D8 d, const uint8_t* p, int count) {
  constexpr int kSize = static_cast<int>(hn::MaxLanes(D8()));
  if (count == kSize) return hn::LoadU(d, p);
  if constexpr (kSize <= 8) {
    const uint64_t bytes = LoadBytes(p, count);
    return hn::LoadU(d, reinterpret_cast<const uint8_t*>(&bytes));
  } else if constexpr (kSize == 16) {
    const hn::Repartition<uint64_t, D8> d64;
    uint64_t low, high = 0;
    if (count <= 8) {
      low = LoadBytes(p, count);
    } else {
      std::memcpy(&low, p, 8);
      std::memcpy(&high, p + count - 8, 8);
      high >>= 8 * (16 - count);
    }
    return hn::BitCast(d, hn::OddEven(hn::Set(d64, high), hn::Set(d64, low)));
  } else {
    const hn::Half<D8> half;
    if (count <= 16) return hn::ZeroExtendVector(d, LoadFirstBytes(half, p, count));
    return hn::Combine(d, LoadFirstBytes(half, p + 16, count - 16), hn::LoadU(half, p));
  }
}

template <class D8>
HWY_INLINE void StoreFirstBytes(hn::Vec<D8> v, D8 d, uint8_t* p, int count) {
  constexpr int kSize = static_cast<int>(hn::MaxLanes(D8()));
  if (count == kSize) return hn::StoreU(v, d, p);
  if constexpr (kSize <= 8) {
    uint64_t bytes = 0;
    hn::StoreU(v, d, reinterpret_cast<uint8_t*>(&bytes));
    StoreBytes(bytes, p, count);
  } else if constexpr (kSize == 16) {
    const hn::Repartition<uint64_t, D8> d64;
    const uint64_t low = hn::GetLane(hn::BitCast(d64, v));
    if (count <= 8) return StoreBytes(low, p, count);
    const int shift = 8 * (count - 8);  // below 64
    const uint64_t last = low >> shift | hn::GetLane(hn::UpperHalf(hn::Half<decltype(d64)>(), hn::BitCast(d64, v)))
                                             << (64 - shift);
    std::memcpy(p, &low, 8);
    std::memcpy(p + count - 8, &last, 8);
  } else {
    const hn::Half<D8> half;
    if (count <= 16) return StoreFirstBytes(hn::LowerHalf(half, v), half, p, count);
    hn::StoreU(hn::LowerHalf(half, v), half, p);
    StoreFirstBytes(hn::UpperHalf(half, v), half, p + 16, count - 16);
  }
}
#endif

// The elements of a tensor from `at` on, as a vector of DT; those behind the first `span.count` are left out.
template <class D, class DT>
HWY_INLINE hn::Vec<DT> LoadFrom(Whole<D>, DT d, const hn::TFromD<DT>* p, int at) {
  return hn::LoadU(d, p + at);
}
template <class D, bool kReadAll, class DT>
HWY_INLINE hn::Vec<DT> LoadFrom(First<D, kReadAll> span, DT d, const hn::TFromD<DT>* p, int at) {
  if constexpr (kReadAll) return hn::LoadU(d, p + at);
#if HWY_TARGET == HWY_AVX3
  return hn::MaskedLoad(span.Inside(d, at), d, p + at);
#else
  constexpr int kSize = static_cast<int>(sizeof(hn::TFromD<DT>));
  const int count = HWY_MIN(span.count - at, static_cast<int>(hn::MaxLanes(DT())));
  if (count <= 0) return hn::Zero(d);
  const hn::Repartition<uint8_t, DT> d8;
  return hn::BitCast(d, LoadFirstBytes(d8, reinterpret_cast<const uint8_t*>(p + at), count * kSize));
#endif
}

template <class D, class DT>
HWY_INLINE void StoreFrom(Whole<D>, hn::Vec<DT> v, DT d, hn::TFromD<DT>* p, int at) {
  hn::StoreU(v, d, p + at);
}
template <class D, bool kReadAll, class DT>
HWY_INLINE void StoreFrom(First<D, kReadAll> span, hn::Vec<DT> v, [[maybe_unused]] DT d, hn::TFromD<DT>* p, int at) {
#if HWY_TARGET == HWY_AVX3
  hn::BlendedStore(v, span.Inside(d, at), d, p + at);
#else
  constexpr int kSize = static_cast<int>(sizeof(hn::TFromD<DT>));
  const int count = HWY_MIN(span.count - at, static_cast<int>(hn::MaxLanes(DT())));
  if (count <= 0) return;
  const hn::Repartition<uint8_t, DT> d8;
  StoreFirstBytes(hn::BitCast(d8, v), d8, reinterpret_cast<uint8_t*>(p + at), count * kSize);
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
