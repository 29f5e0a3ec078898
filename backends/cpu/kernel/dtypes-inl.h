// Part of rope-inl.h: the dtypes of tensors and caches, as vectors of floats.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_DTYPES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_DTYPES_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_DTYPES_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_DTYPES_INL_H_
#endif

#include "backends/cpu/kernel/vectors-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

// ---------------------------------------------------------------------------------------------------------------------
// Conversions. Round to nearest, ties to even.

// A float as a smaller one, in the low bits of each lane: kMantissa bits of it, exponent bias kBias. Beyond the largest
// the code is kTop: infinity, or the largest finite number. Subnormal results come from an addition whose last place is
// theirs.
template <int kMantissa, int kBias, uint32_t kTop, uint32_t kNan, int kSignShift, class VF>
HWY_INLINE hn::Vec<Unsigned<hn::DFromV<VF>>> Encode(VF v) {
  const hn::DFromV<VF> d;
  const Unsigned<hn::DFromV<VF>> u;
  constexpr int kDrop = 23 - kMantissa;
  const auto bits = hn::BitCast(u, v);
  const auto magnitude = hn::And(bits, hn::Set(u, 0x7fffffffu));
  const auto odd = hn::And(hn::ShiftRight<kDrop>(magnitude), hn::Set(u, 1u));
  const auto rounded = hn::Add(hn::Add(magnitude, hn::Set(u, (1u << (kDrop - 1)) - 1)), odd);
  const auto normal = hn::ShiftRight<kDrop>(hn::Sub(rounded, hn::Set(u, uint32_t{127 - kBias} << 23)));
  const auto magic = hn::Set(u, uint32_t{127 + 1 - kBias + kDrop} << 23);
  const auto subnormal = hn::Sub(hn::BitCast(u, hn::Add(hn::BitCast(d, magnitude), hn::BitCast(d, magic))), magic);
  const auto is_subnormal = hn::Lt(hn::BitCast(d, magnitude), hn::BitCast(d, hn::Set(u, uint32_t{128 - kBias} << 23)));
  // The clamp comes before the choice: of a subnormal, `normal` wrapped around.
  auto code = hn::Min(hn::IfThenElse(hn::RebindMask(u, is_subnormal), subnormal, normal), hn::Set(u, kTop));
  code = hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(v)), hn::Set(u, kNan), code);
  return hn::Or(code, hn::ShiftLeft<kSignShift>(hn::ShiftRight<31>(bits)));
}

// An fp8 code in each lane.
template <class VF>
HWY_INLINE auto EncodeFp8(VF v, bool e4m3) {
  return e4m3 ? Encode<3, 7, 0x7e, 0x7f, 7>(v) : Encode<2, 15, 0x7b, 0x7f, 7>(v);
}

// A bfloat16 in the upper half of each lane, the lower half undefined. A NaN keeps its upper bits and becomes quiet.
template <class VF>
HWY_INLINE hn::Vec<Unsigned<hn::DFromV<VF>>> RoundBf16Bits(VF v) {
  const Unsigned<hn::DFromV<VF>> u;
  const auto bits = hn::BitCast(u, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1u));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(u, 0x7fffu)), odd);
  return hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(v)), hn::Or(bits, hn::Set(u, 0x00400000u)), rounded);
}

template <class D>
HWY_INLINE hn::Vec<D> DecodeF16(D d, hn::Vec<Halves<D>> half) {
#if HWY_TARGET >= HWY_SSE4 && HWY_ARCH_X86  // no F16C
  const Unsigned<D> u;
  const auto bits = hn::PromoteTo(u, half);
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(u, 0x7fffu)));
  auto value = hn::Mul(hn::BitCast(d, magnitude), hn::BitCast(d, hn::Set(u, uint32_t{127 + 112} << 23)));
  const auto special = hn::Ge(hn::BitCast(d, magnitude), hn::BitCast(d, hn::Set(u, 0x0f800000u)));
  value = hn::IfThenElse(special, hn::BitCast(d, hn::Or(magnitude, hn::Set(u, 0x7f800000u))), value);
  // A subnormal half is no subnormal float on the way, which a caller's mode (DAZ) may take for zero.
  const auto least = hn::Set(u, uint32_t{113} << 23);  // 2^-14
  const auto small = hn::Abs(hn::Sub(hn::BitCast(d, hn::Or(magnitude, least)), hn::BitCast(d, least)));
  value = hn::IfThenElse(hn::RebindMask(d, hn::Lt(magnitude, hn::Set(u, 1u << 23))), small, value);
  return hn::Or(value, hn::BitCast(d, hn::ShiftLeft<31>(hn::ShiftRight<15>(bits))));
#else
  return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), half));
#endif
}

template <class VF>
HWY_INLINE hn::Vec<Halves<hn::DFromV<VF>>> EncodeF16(VF v) {
  const Halves<hn::DFromV<VF>> d;
#if HWY_TARGET >= HWY_SSE4 && HWY_ARCH_X86
  return hn::TruncateTo(d, Encode<10, 15, 0x7c00, 0x7e00, 15>(v));
#else
  return hn::BitCast(d, hn::DemoteTo(hn::Rebind<hwy::float16_t, hn::DFromV<VF>>(), v));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// The dtypes of tensors. A pair of vectors, a and b, holds their elements in the order that loads cheapest: the even
// and the odd ones of bfloat16 (kEvenOdd), else the lower and the upper half.

struct F32 {
  using Raw = float;
  static constexpr uint8_t kDtype = kRopeF32;
  static constexpr bool kEvenOdd = false;
  static constexpr Raw kNan = __builtin_nanf("");
  template <class VF>
  static HWY_INLINE VF Round(VF v) {
    return v;
  }
  template <class Span>
  static HWY_INLINE auto Load(Span span, const Raw* p, int at) {
    return LoadFrom(span, typename Span::D(), p, at);
  }
  template <bool kNative, class Span, class VF>
  static HWY_INLINE void Store(Span span, VF v, Raw* p, int at) {
    StoreFrom(span, v, typename Span::D(), p, at);
  }
};

struct F16 {
  using Raw = uint16_t;
  static constexpr uint8_t kDtype = kRopeF16;
  static constexpr bool kEvenOdd = false;
  static constexpr Raw kNan = 0x7e00;
  template <class VF>
  static HWY_INLINE VF Round(VF v) {
    return DecodeF16(hn::DFromV<VF>(), EncodeF16(v));
  }
  template <class Span>
  static HWY_INLINE auto Load(Span span, const Raw* p, int at) {
    using D = typename Span::D;
    return DecodeF16(D(), LoadFrom(span, Halves<D>(), p, at));
  }
  template <bool kNative, class Span, class VF>
  static HWY_INLINE void Store(Span span, VF v, Raw* p, int at) {
    StoreFrom(span, EncodeF16(v), Halves<typename Span::D>(), p, at);
  }
};

#if HWY_TARGET == HWY_AVX3
// Words of which none of some bits is set. The bits of zero and subnormal numbers: kExponent; of what is below 2^-63:
// kLargeExponent.
constexpr int16_t kExponent = 0x7f80, kLargeExponent = 0x6000;
HWY_INLINE __mmask32 WordsWithout(int16_t bits, __m512i words, __mmask32 inside) {
  return _mm512_mask_testn_epi16_mask(inside, words, _mm512_set1_epi16(bits));
}
HWY_INLINE __mmask16 WordsWithout(int16_t bits, __m256i words, __mmask16 inside) {
  return _mm256_mask_testn_epi16_mask(inside, words, _mm256_set1_epi16(bits));
}
HWY_INLINE __mmask8 WordsWithout(int16_t bits, __m128i words, __mmask8 inside) {
  return _mm_mask_testn_epi16_mask(inside, words, _mm_set1_epi16(bits));
}
HWY_INLINE bool NoneOf(__mmask32 a, __mmask32 b) { return _kortestz_mask32_u8(a, b); }
HWY_INLINE bool NoneOf(__mmask16 a, __mmask16 b) { return _kortestz_mask16_u8(a, b); }
HWY_INLINE bool NoneOf(__mmask8 a, __mmask8 b) { return _kortestz_mask8_u8(a, b); }
// Whether there is such a word inside the span, in one of two vectors.
template <class D, class VW>
HWY_INLINE bool AnyWithout(int16_t bits, Whole<D>, VW a, VW b, int) {
  const decltype(hn::Mask<hn::DFromV<VW>>::raw) all = static_cast<decltype(all)>(~0u);
  return !NoneOf(WordsWithout(bits, a.raw, all), WordsWithout(bits, b.raw, all));
}
template <class D, bool kReadAll, class VW>
HWY_INLINE bool AnyWithout(int16_t bits, First<D, kReadAll> span, VW a, VW b, int at) {
  const auto inside = span.Inside(hn::DFromV<VW>(), at).raw;
  return !NoneOf(WordsWithout(bits, a.raw, inside), WordsWithout(bits, b.raw, inside));
}
#endif

#if HWY_TARGET == HWY_AVX3
template <class VF>
HWY_INLINE hn::Vec<Halves<hn::DFromV<VF>>> NarrowNatively(VF v) {
  hn::Vec<Halves<hn::DFromV<VF>>> words;
  if constexpr (sizeof(v.raw) == 64) {
    words.raw = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.raw));
  } else {
    words.raw = reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v.raw));
  }
  return words;
}
#endif

struct BF16 {
  using Raw = uint16_t;
  static constexpr uint8_t kDtype = kRopeBF16;
  static constexpr bool kEvenOdd = true;
  static constexpr Raw kNan = 0x7fc0;
  template <class VF>
  static HWY_INLINE VF Round(VF v) {
    const hn::DFromV<VF> d;
    const Unsigned<hn::DFromV<VF>> u;
    return hn::BitCast(d, hn::And(RoundBf16Bits(v), hn::Set(u, 0xffff0000u)));
  }
  template <class Span>
  static HWY_INLINE auto Load(Span span, const Raw* p, int at) {
    using D = typename Span::D;
    return hn::BitCast(D(), hn::ShiftLeft<16>(hn::PromoteTo(Unsigned<D>(), LoadFrom(span, Halves<D>(), p, at))));
  }
  // kNative: by the CPU's own instruction, which takes subnormal numbers for zero. Where a result is one or the other,
  // the integers round.
  template <bool kNative, class Span, class VF>
  static HWY_INLINE void Store(Span span, VF v, Raw* p, int at) {
    const Halves<typename Span::D> d;
#if HWY_TARGET == HWY_AVX3
    if constexpr (kNative) {
      const auto words = NarrowNatively(v);
      if (HWY_LIKELY(!AnyWithout(kExponent, span, words, words, at))) return StoreFrom(span, words, d, p, at);
    }
#endif
    StoreFrom(span, hn::TruncateTo(d, hn::ShiftRight<16>(RoundBf16Bits(v))), d, p, at);
  }
};

template <class D>
HWY_INLINE void UnpackBf16(D d, hn::Vec<Words<D>> words, hn::Vec<D>& a, hn::Vec<D>& b) {
  const Unsigned<D> u;
  a = hn::BitCast(d, hn::ShiftLeft<16>(hn::BitCast(u, words)));
  b = hn::BitCast(d, hn::And(hn::BitCast(u, words), hn::Set(u, 0xffff0000u)));
}

// Loads a pair of vectors from one place.
template <class T, class Span>
HWY_INLINE void LoadPair(Span span, const typename T::Raw* p, hn::Vec<typename Span::D>& a,
                         hn::Vec<typename Span::D>& b) {
  using D = typename Span::D;
  if constexpr (T::kEvenOdd) {
    UnpackBf16(D(), LoadFrom(span, Words<D>(), p, 0), a, b);
  } else {
    a = T::Load(span, p, 0);
    b = T::Load(span, p, static_cast<int>(hn::MaxLanes(D())));
  }
}

// The words of a pair of vectors of bfloat16.
template <class VF>
HWY_INLINE hn::Vec<Words<hn::DFromV<VF>>> PackBf16(VF a, VF b) {
  const Unsigned<hn::DFromV<VF>> u;
  const auto odd = hn::And(RoundBf16Bits(b), hn::Set(u, 0xffff0000u));
  return hn::BitCast(Words<hn::DFromV<VF>>(), hn::Or(hn::ShiftRight<16>(RoundBf16Bits(a)), odd));
}
#if HWY_TARGET == HWY_AVX3
template <class VF>
HWY_INLINE hn::Vec<Words<hn::DFromV<VF>>> PackBf16Natively(VF a, VF b) {
  alignas(64) static constexpr uint16_t kInterleave[2][32] = {
      {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31},
      {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15}};
  hn::Vec<Words<hn::DFromV<VF>>> words;
  if constexpr (sizeof(a.raw) == 64) {
    words.raw = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave[0]),
                                         reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.raw, a.raw)));
  } else {
    words.raw = _mm256_permutexvar_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(kInterleave[1])),
                                         reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(b.raw, a.raw)));
  }
  return words;
}
#endif

template <class T, bool kNative, class Span, class VF>
HWY_INLINE void StorePair(Span span, typename T::Raw* p, VF a, VF b) {
  using D = typename Span::D;
  if constexpr (T::kEvenOdd) {
    const Words<D> d;
#if HWY_TARGET == HWY_AVX3
    if constexpr (kNative) {
      const auto words = PackBf16Natively(a, b);
      if (HWY_LIKELY(!AnyWithout(kExponent, span, words, words, 0))) return StoreFrom(span, words, d, p, 0);
    }
#endif
    StoreFrom(span, PackBf16(a, b), d, p, 0);
  } else {
    T::template Store<kNative>(span, a, p, 0);
    T::template Store<kNative>(span, b, p, static_cast<int>(hn::MaxLanes(D())));
  }
}

// Two pairs, to two places. A look for zeros costs as much for both as for one.
template <class T, bool kNative, class Span, class VF>
HWY_INLINE void StorePairs(Span span, typename T::Raw* p, VF a, VF b, typename T::Raw* q, VF c, VF d) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    const Words<typename Span::D> dw;
    const auto first = PackBf16Natively(a, b), second = PackBf16Natively(c, d);
    if (HWY_LIKELY(!AnyWithout(kExponent, span, first, second, 0))) {
      StoreFrom(span, first, dw, p, 0);
      StoreFrom(span, second, dw, q, 0);
      return;
    }
    StorePair<T, false>(span, p, a, b);
    StorePair<T, false>(span, q, c, d);
    return;
  }
#endif
  StorePair<T, kNative>(span, p, a, b);
  StorePair<T, kNative>(span, q, c, d);
}

// Two vectors in natural order, likewise.
template <class T, bool kNative, class Span, class VF>
HWY_INLINE void StoreVectors(Span span, typename T::Raw* p, VF a, typename T::Raw* q, VF b) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    const Halves<typename Span::D> dw;
    const auto first = NarrowNatively(a), second = NarrowNatively(b);
    if (HWY_LIKELY(!AnyWithout(kExponent, span, first, second, 0))) {
      StoreFrom(span, first, dw, p, 0);
      StoreFrom(span, second, dw, q, 0);
      return;
    }
    T::template Store<false>(span, a, p, 0);
    T::template Store<false>(span, b, q, 0);
    return;
  }
#endif
  T::template Store<kNative>(span, a, p, 0);
  T::template Store<kNative>(span, b, q, 0);
}

// The same as fp8 codes: a vector, or a pair of them.
template <class Span, class VF>
HWY_INLINE void StoreFp8(Span span, uint8_t* p, VF v, int at, bool e4m3) {
  const Bytes<typename Span::D> d;
  StoreFrom(span, hn::TruncateTo(d, EncodeFp8(v, e4m3)), d, p, at);
}
template <class T, class Span, class VF>
HWY_INLINE void StoreFp8Pair(Span span, uint8_t* p, VF a, VF b, bool e4m3) {
  using D = typename Span::D;
  if constexpr (T::kEvenOdd) {
    const hn::Repartition<uint8_t, Halves<D>> d;
    const auto pairs = hn::TruncateTo(Halves<D>(), hn::Or(EncodeFp8(a, e4m3), hn::ShiftLeft<8>(EncodeFp8(b, e4m3))));
    StoreFrom(span, hn::BitCast(d, pairs), d, p, 0);
  } else {
    StoreFp8(span, p, a, 0, e4m3);
    StoreFp8(span, p, b, static_cast<int>(hn::MaxLanes(D())), e4m3);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
