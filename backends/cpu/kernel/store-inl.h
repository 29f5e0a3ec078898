// Part of rope-inl.h: a run of elements in vectors, and where a head goes.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_STORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_STORE_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_STORE_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_STORE_INL_H_
#endif

#include "backends/cpu/kernel/dtypes-inl.h"
#include "backends/cpu/kernel/norm-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

// The kinds of spans that a function is compiled for. kPartsOnly: where speed is not worth the code. kHalvesToo: a
// narrow vector that is full needs no mask, with which bfloat16 heads of 96 with a norm take 1.1 times as long.
enum Spans { kPartsOnly, kWholeAndParts, kHalvesToo, kReadingAll };

// Calls work(span, at) for a run of elements from the at-th on, as many at a time as a pair of vectors holds, the last
// time for a part of them. `room`: so many may be read from the run's first on.
template <Spans kSpans, int kUnit = kBlock, class Work>
HWY_INLINE void EachPair(int length, int at, int room, const Work& work) {
  if constexpr (kSpans == kPartsOnly) {
    for (; at < length; at += kUnit) work(First<DF>{HWY_MIN(kUnit, length - at)}, at);
    return;
  }
  constexpr bool kReadAll = kSpans == kReadingAll;
  for (; at + kUnit <= length; at += kUnit) work(Whole<DF>(), at);
  const int rest = length - at;
  if (rest == 0) return;
  if constexpr (kHasNarrow) {
    if constexpr (kSpans == kHalvesToo) {
      if (rest == kUnit / 2) return work(Whole<DNarrow>(), at);
    }
    if (rest <= kUnit / 2) {
      if (kReadAll && at + kUnit / 2 <= room) return work(First<DNarrow, kReadAll>{rest}, at);
      return work(First<DNarrow>{rest}, at);
    }
  }
  if (kReadAll && at + kUnit <= room) return work(First<DF, kReadAll>{rest}, at);
  work(First<DF>{rest}, at);
}

// The same, a vector at a time.
template <Spans kSpans, class Work>
HWY_INLINE void EachVector(int length, int room, const Work& work) {
  EachPair<kSpans, kLanes>(length, 0, room, work);
}

// See Group::Each.
template <class Span>
constexpr int kTurnsOf = 1;
#if HWY_TARGET == HWY_AVX3
template <class D, bool kReadAll>
constexpr int kTurnsOf<First<D, kReadAll>> = 2;
#endif

// Where a head goes: its tensor, and a cache.
template <class C, bool kStore, bool kNative>
struct Output {
  using T = typename C::T;
  using Raw = typename C::Raw;
  Raw* out;  // null: only stored, as fp8
  void* cache;
  uint8_t cache_dtype;
  V inverse_scale;  // of fp8

  // `at` counts from the head's first element.
  template <class Span, class VF>
  HWY_INLINE void Pair(Span span, int at, VF a, VF b) const {
    if (!kStore || out) StorePair<T, kNative>(span, out + at, a, b);
    CachePair(span, at, a, b);
  }

  // Two pairs, to two places.
  template <class Span, class VF>
  HWY_INLINE void Pairs(Span span, int at_x, VF xa, VF xb, int at_y, VF ya, VF yb) const {
    if (!kStore || out) StorePairs<T, kNative>(span, out + at_x, xa, xb, out + at_y, ya, yb);
    CachePair(span, at_x, xa, xb);
    CachePair(span, at_y, ya, yb);
  }

  template <class Span, class VF>
  HWY_INLINE void CachePair(Span span, int at, VF a, VF b) const {
    if constexpr (kStore) {
      if (cache_dtype == T::kDtype) {
        StorePair<T, kNative>(span, static_cast<Raw*>(cache) + at, a, b);
      } else {
        StoreFp8Pair<T>(span, static_cast<uint8_t*>(cache) + at, Scaled(a), Scaled(b), cache_dtype == kRopeE4M3);
      }
    }
  }

  template <class Span, class VF>
  HWY_INLINE void Vector(Span span, int at, VF v) const {
    if (!kStore || out) T::template Store<kNative>(span, v, out + at, 0);
    CacheVector(span, at, v);
  }
  template <class Span, class VF>
  HWY_INLINE void Vectors(Span span, int at_x, VF x, int at_y, VF y) const {
    if (!kStore || out) StoreVectors<T, kNative>(span, out + at_x, x, out + at_y, y);
    CacheVector(span, at_x, x);
    CacheVector(span, at_y, y);
  }
  template <class Span, class VF>
  HWY_INLINE void CacheVector(Span span, int at, VF v) const {
    if constexpr (kStore) {
      if (cache_dtype == T::kDtype) {
        T::template Store<kNative>(span, v, static_cast<Raw*>(cache) + at, 0);
      } else {
        StoreFp8(span, static_cast<uint8_t*>(cache) + at, Scaled(v), 0, cache_dtype == kRopeE4M3);
      }
    }
  }

  // Elements whose bits stay.
  HWY_INLINE void Copy(const Raw* in, const Run& run) const {
    const bool moved = out && in != out, same = kStore && cache_dtype == T::kDtype;
    if (moved || same) {
      const hn::ScalableTag<Raw> d;
      const auto copy = [&](auto span, int at) ROPEWALK_ATTR {
        const auto bits = LoadFrom(span, d, in + run.begin + at, 0);
        if (moved) StoreFrom(span, bits, d, out + run.begin + at, 0);
        if (same) StoreFrom(span, bits, d, static_cast<Raw*>(cache) + run.begin + at, 0);
      };
      int at = 0;
      constexpr int kStep = static_cast<int>(hn::MaxLanes(d));
      for (; at + kStep <= run.length; at += kStep) copy(Whole<DF>(), at);
      if (at < run.length) copy(First<DF>{run.length - at}, at);
    }
    if (kStore && !same) {
      EachPair<kPartsOnly>(run.length, 0, 0, [&](auto span, int at) ROPEWALK_ATTR {
        hn::Vec<typename decltype(span)::D> a, b;
        LoadPair<T>(span, in + run.begin + at, a, b);
        CachePair(span, run.begin + at, a, b);
      });
    }
  }

 private:
  template <class VF>
  HWY_INLINE VF Scaled(VF v) const {
    if constexpr (C::kReference) v = T::Round(v);
    return hn::Mul(v, Narrowed<hn::DFromV<VF>>(inverse_scale));
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
