// Part of rope-inl.h: the heads of a token, normalised and rotated.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_HEADS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_HEADS_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_HEADS_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_HEADS_INL_H_
#endif

#include "backends/cpu/kernel/norm-inl.h"
#include "backends/cpu/kernel/store-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

// Some heads of a token. Each function works on one vector, or pair of vectors, of all of them, so that what is the
// same for all stays in registers: a head at a time, with its table read again for each, 24 of 96 takes 1.9 times as
// long.
template <class C, bool kStore, bool kNative>
struct Group {
  using T = typename C::T;
  using Raw = typename C::Raw;
  static constexpr bool kFolded = C::kNorm && !C::kReference;
  // A norm needs the squares of what is inside.
  static constexpr Spans kSpans = C::kReference                    ? kPartsOnly
                                  : C::kNorm && kNative && !kStore ? kHalvesToo
                                  : C::kNorm || kStore             ? kWholeAndParts
                                                                   : kReadingAll;

  const Heads<T>& heads;  // all of the token
  const Parts& parts;
  int64_t first_head, count;  // the group's

  // Calls work(in, output, 1 / rms, sums) for each head; `sums` are of the squares of the same head of the next token,
  // of which each pass adds what it has to do with, the first, of the first rotated elements, to nothing. kTurns: 2 for
  // every other head first. A masked store holds up loads of what it leaves out, which may be the next head: 80 of 80,
  // contiguous, took 2.7 times as long.
  template <int kTurns, class Work>
  HWY_INLINE void Each(const Work& work) const {
    // Copies, which no store can alias.
    const int64_t in_head = heads.in_head, out_head = heads.out_head, heads_here = count;
    const bool written = !kStore || heads.out, fp8 = kStore && heads.cache_dtype != T::kDtype;
    const int64_t cache_head = heads.cache_head * (fp8 ? 1 : static_cast<int64_t>(sizeof(Raw)));
    const float* rstds = heads.rstd;
    for (int64_t turn = 0; turn < kTurns; ++turn) {
      const int64_t first = first_head + turn;
      const Raw* in = heads.in + first * in_head;
      float* sums = heads.squares + turn * kLanes;
      Output<C, kStore, kNative> output = {written ? heads.out + first * out_head : nullptr, nullptr, heads.cache_dtype,
                                           hn::Zero(df)};
      if constexpr (kStore) output.cache = static_cast<char*>(heads.cache) + first * cache_head;
      for (int64_t h = turn; h < heads_here; h += kTurns) {
        V rstd = hn::Zero(df);
        if constexpr (C::kNorm) rstd = hn::Set(df, rstds[h]);
        if (fp8) {
          output.inverse_scale =
              hn::Set(df, 1.0f / (heads.scale ? heads.scale[(first_head + h) * heads.scale_head] : heads.scale_value));
        }
        work(in, output, rstd, sums);
        if constexpr (kFolded) sums += kTurns * kLanes;
        in += kTurns * in_head;
        if (written) output.out += kTurns * out_head;
        if constexpr (kStore) output.cache = static_cast<char*>(output.cache) + kTurns * cache_head;
      }
    }
  }

  // The same elements of a later token, into L2: what the hardware's prefetchers bring comes too late where the work on
  // a head takes as long as its way from memory. Rope in DRAM: 0.92 of the floor; into L1, 8 heads ahead: 0.80.
  HWY_INLINE void Prefetch(const Raw* later) const { __builtin_prefetch(later, 0, 2); }

  // How far apart the second and the first vector of a pair lie in a table of kWidth values for each element.
  template <class D, int kWidth = 1>
  static constexpr int kSecond = T::kEvenOdd || hn::MaxLanes(D()) == kLanes ? kWidth* kLanes : kLanes / 2;

  template <class D>
  HWY_INLINE Angles<D> LoadAngles(D d, int at) const {  // of the at-th pair
    if constexpr (kFolded) {
      const float* factor = heads.folded + at;
      return {hn::Load(d, factor), hn::Load(d, factor + kLanes), hn::Load(d, factor + 2 * kLanes),
              hn::Load(d, factor + 3 * kLanes)};
    } else {
      const auto c = hn::Load(d, heads.cos + at), s = hn::Load(d, heads.sin + at);
      return {c, s, c, s};
    }
  }

  // Of a vector of elements and their weights, where these are not in the angles.
  template <class VF>
  HWY_INLINE VF Normalise(VF v, VF weight, V rstd) const {
    const VF unit = hn::Mul(v, Narrowed<hn::DFromV<VF>>(rstd));
    if constexpr (!C::kReference) return hn::Mul(unit, weight);
    // The Hugging Face chains: Llama rounds, then multiplies by the weight; Gemma multiplies, then rounds.
    return T::Round(hn::Mul(heads.zero_centered ? unit : T::Round(unit), weight));
  }

  // Reference rounding, where products are rounded too.
  template <class VF>
  HWY_INLINE VF Product(VF a, VF b) const {
    const VF product = hn::Mul(a, b);
    return heads.round_products ? T::Round(product) : product;
  }

  // (x, y) -> (x cos - y sin, y cos + x sin)
  template <class VF, class D>
  HWY_INLINE void Rotate(VF& x, VF& y, const Angles<D>& angles, V rstd) const {
    if constexpr (C::kReference) {
      const VF ys = Product(y, angles.y_sin), xs = Product(x, angles.x_sin);
      x = hn::Sub(Product(x, angles.x_cos), ys);
      y = hn::Add(Product(y, angles.y_cos), xs);
    } else {
      if constexpr (kFolded) {
        // Scaled first: products of subnormal numbers would lose what the scale brings back.
        x = hn::Mul(x, Narrowed<D>(rstd));
        y = hn::Mul(y, Narrowed<D>(rstd));
      }
      const VF old = x;
      x = hn::NegMulAdd(y, angles.y_sin, hn::Mul(x, angles.x_cos));
      y = hn::MulAdd(old, angles.x_sin, hn::Mul(y, angles.y_cos));
    }
  }

  // Neox: from element `at` of both halves on.
  template <class Span>
  HWY_NOINLINE void RotateHalves(Span span, int at) const {
    using D = typename Span::D;
    using VF = hn::Vec<D>;
    const D d;
    constexpr int kFactors = kFolded ? 4 : 1;
    const auto a = LoadAngles(d, kFactors * at), b = LoadAngles(d, kFactors * at + kSecond<D, kFactors>);
    const int first = parts.part[1].begin + at, second = parts.part[2].begin + at;
    VF weight[4] = {a.x_cos, a.x_cos, a.x_cos, a.x_cos};
    if constexpr (C::kNorm && !kFolded) {
      for (int i = 0; i < 4; ++i) {
        weight[i] = hn::Load(d, heads.weight + parts.part[1 + i / 2].table + at + i % 2 * kSecond<D>);
      }
    }
    const int64_t later = heads.prefetch, ahead = heads.next ? heads.next - heads.in : 0;
    Each<kTurnsOf<Span>>([&](const Raw* in, const auto& output, V rstd, float* sums) ROPEWALK_ATTR {
      VF xa, xb, ya, yb;
      Prefetch(in + first + later);
      if (hn::MaxLanes(D()) == kLanes) Prefetch(in + second + later);
      LoadPair<T>(span, in + first, xa, xb);
      LoadPair<T>(span, in + second, ya, yb);
      if (kFolded && ahead) {
        const V half = AddSquares<T, kNative>(span, in + first + ahead, at == 0 ? hn::Zero(df) : hn::Load(df, sums));
        hn::Store(AddSquares<T, kNative>(span, in + second + ahead, half), df, sums);
      }
      if constexpr (C::kNorm && !kFolded) {
        xa = Normalise(xa, weight[0], rstd);
        xb = Normalise(xb, weight[1], rstd);
        ya = Normalise(ya, weight[2], rstd);
        yb = Normalise(yb, weight[3], rstd);
      }
      Rotate(xa, ya, a, rstd);
      Rotate(xb, yb, b, rstd);
      output.Pairs(span, first, xa, xb, second, ya, yb);
    });
  }

  // The same of one vector of each half, in natural order.
  template <class Span>
  HWY_NOINLINE void RotateHalfVectors(Span span, int at) const {
    using D = typename Span::D;
    const D d;
    const auto angles = LoadAngles(d, (kFolded ? 4 : 1) * at);
    const int first = parts.part[1].begin + at, second = parts.part[2].begin + at;
    const float* weight = C::kNorm ? heads.weight + at : heads.cos;
    const auto weight_x = hn::Load(d, weight + (C::kNorm ? parts.part[1].table : 0));
    const auto weight_y = hn::Load(d, weight + (C::kNorm ? parts.part[2].table : 0));
    const int64_t later = heads.prefetch, ahead = heads.next ? heads.next - heads.in : 0;
    Each<kTurnsOf<Span>>([&](const Raw* in, const auto& output, V rstd, float* sums) ROPEWALK_ATTR {
      Prefetch(in + first + later);
      auto x = T::Load(span, in + first, 0), y = T::Load(span, in + second, 0);
      if (kFolded && ahead) {
        const auto next_x = T::Load(span, in + first + ahead, 0), next_y = T::Load(span, in + second + ahead, 0);
        V sum = Widened(hn::MulAdd(next_x, next_x, hn::Mul(next_y, next_y)));
        if (at > 0) sum = hn::Add(sum, hn::Load(df, sums));
        hn::Store(sum, df, sums);
      }
      if constexpr (C::kNorm && !kFolded) {
        x = Normalise(x, weight_x, rstd);
        y = Normalise(y, weight_y, rstd);
      }
      Rotate(x, y, angles, rstd);
      output.Vectors(span, first, x, second, y);
    });
  }

  // Interleaved, as the even and the odd elements of words: from element `at` of the part on, kBlocks blocks.
  template <int kBlocks, class Span>
  HWY_NOINLINE void RotateWords(Span span, int at) const {
    using D = typename Span::D;
    using VF = hn::Vec<D>;
    const D d;
    constexpr int kFactors = kFolded ? 4 : 1, kNext = kBlocks - 1;  // the second block, or the first again
    const auto a = LoadAngles(d, kFactors * (at / 2)), b = LoadAngles(d, kFactors * (at / 2 + kNext * kLanes));
    const int first = parts.part[1].begin + at, second = first + kNext * kBlock;
    VF weight[4] = {a.x_cos, a.x_cos, a.x_cos, a.x_cos};
    if constexpr (C::kNorm && !kFolded) {
      for (int i = 0; i < 2 * kBlocks; ++i)
        weight[i] = hn::Load(d, heads.weight + parts.part[1].table + at + i * kLanes);
    }
    const int64_t later = heads.prefetch, ahead = heads.next ? heads.next - heads.in : 0;
    Each<kTurnsOf<Span>>([&](const Raw* in, const auto& output, V rstd, float* sums) ROPEWALK_ATTR {
      VF xa, ya, xb, yb;
      Prefetch(in + first + later);
      LoadPair<T>(span, in + first, xa, ya);
      if constexpr (kBlocks == 2) {
        Prefetch(in + second + later);
        LoadPair<T>(span, in + second, xb, yb);
      }
      if (kFolded && ahead) {
        V sum = AddSquares<T, kNative>(span, in + first + ahead, at == 0 ? hn::Zero(df) : hn::Load(df, sums));
        if constexpr (kBlocks == 2) sum = AddSquares<T, kNative>(span, in + second + ahead, sum);
        hn::Store(sum, df, sums);
      }
      if constexpr (C::kNorm && !kFolded) {
        xa = Normalise(xa, weight[0], rstd);
        ya = Normalise(ya, weight[1], rstd);
        if constexpr (kBlocks == 2) {
          xb = Normalise(xb, weight[2], rstd);
          yb = Normalise(yb, weight[3], rstd);
        }
      }
      Rotate(xa, ya, a, rstd);
      if constexpr (kBlocks == 2) {
        Rotate(xb, yb, b, rstd);
        output.Pairs(span, first, xa, ya, second, xb, yb);
      } else {
        output.Pair(span, first, xa, ya);
      }
    });
  }

#if HWY_TARGET == HWY_AVX3
  static constexpr bool kByTwos = kNative && !C::kNorm && !kStore;
  // Bfloat16 without a norm, a part of a pair of vectors: two heads at a time, which share the look for numbers that
  // the CPU's own rounding would take for zero. Of a head alone it takes a quarter of the time.
  template <class Span>
  HWY_NOINLINE void RotateTwo(Span span, int at) const {
    using D = typename Span::D;
    using VF = hn::Vec<D>;
    const D d;
    const Words<D> words;
    constexpr bool kHalves = !C::kInterleaved;
    const auto a = LoadAngles(d, kHalves ? at : at / 2), b = LoadAngles(d, kHalves ? at + kSecond<D> : at / 2);
    const int64_t in_head = heads.in_head, out_head = heads.out_head, later = heads.prefetch;
    const Raw* const first_x = heads.in + first_head * in_head + parts.part[1].begin + at;
    Raw* const first_out = heads.out + first_head * out_head + parts.part[1].begin + at;
    const int64_t y = parts.part[2].begin - parts.part[1].begin, pairs = count / 2;  // y: from x on
    // Every other two first: see Each.
    for (int64_t turn = 0; turn < 2; ++turn) {
      const Raw* x = first_x + 2 * turn * in_head;
      Raw* x_out = first_out + 2 * turn * out_head;
      for (int64_t h = turn; h < pairs; h += 2, x += 4 * in_head, x_out += 4 * out_head) {
        Prefetch(x + later);
        Prefetch(x + in_head + later);
        const auto x0 = LoadFrom(span, words, x, 0), x1 = LoadFrom(span, words, x + in_head, 0);
        auto y0 = x0, y1 = x1;
        if constexpr (kHalves) {
          y0 = LoadFrom(span, words, x + y, 0);
          y1 = LoadFrom(span, words, x + in_head + y, 0);
        }
        // Of a pair the larger one counts.
        if (HWY_UNLIKELY(AnyWithout(kLargeExponent, span, hn::Or(x0, y0), hn::Or(x1, y1), 0))) {
          Group<C, kStore, false>{heads, parts, first_head + 2 * h, 2}.RotatePair(span, at);
          continue;
        }
        const auto rotate = [&](auto x_words, auto y_words, Raw* out) ROPEWALK_ATTR {
          VF xa, xb, ya, yb;
          UnpackBf16(d, x_words, xa, xb);
          if constexpr (kHalves) {
            UnpackBf16(d, y_words, ya, yb);
            Rotate(xa, ya, a, hn::Zero(df));
            Rotate(xb, yb, b, hn::Zero(df));
            StoreFrom(span, PackBf16Natively(ya, yb), words, out + y, 0);
          } else {
            Rotate(xa, xb, a, hn::Zero(df));
          }
          StoreFrom(span, PackBf16Natively(xa, xb), words, out, 0);
        };
        rotate(x0, y0, x_out);
        rotate(x1, y1, x_out + out_head);
      }
    }
    if (count % 2) Group{heads, parts, first_head + count - 1, 1}.RotatePair(span, at);
  }
#else
  static constexpr bool kByTwos = false;
#endif

  // One pair of vectors of each half; interleaved, of the part.
  template <class Span>
  HWY_INLINE void RotatePair(Span span, int at) const {
    if constexpr (C::kInterleaved) {
      RotateWords<1>(span, at);
    } else {
      RotateHalves(span, at);
    }
  }
  template <class D>
  HWY_INLINE void RotateSome(Whole<D> span, int at) const {
    RotatePair(span, at);
  }
  template <class D, bool kReadAll>
  HWY_INLINE void RotateSome(First<D, kReadAll> span, int at) const {
    if constexpr (kByTwos) {
      RotateTwo(span, at);
    } else {
      RotatePair(span, at);
    }
  }

  // A vector in natural order; the sines carry the signs.
  template <class Span>
  HWY_NOINLINE void RotateNatural(Span span, int at) const {
    using D = typename Span::D;
    using VF = hn::Vec<D>;
    const D d;
    const float* factor = heads.folded + 2 * at;
    const VF c = hn::Load(d, kFolded ? factor : heads.cos + at);
    const VF s = hn::Load(d, kFolded ? factor + kLanes : heads.sin + at);
    const VF weight = hn::Load(d, C::kNorm ? heads.weight + parts.part[1].table + at : heads.cos);
    const Partners<C::kInterleaved, D> partners(parts);
    const int begin = parts.part[1].begin + at;
    const int64_t later = heads.prefetch, ahead = heads.next ? heads.next - heads.in : 0;
    Each<kTurnsOf<Span>>([&](const Raw* in, const auto& output, V rstd, float* sums) ROPEWALK_ATTR {
      Prefetch(in + begin + later);
      VF v = T::Load(span, in + begin, 0);
      if (kFolded && ahead) {
        const VF next = T::Load(span, in + begin + ahead, 0);
        V sum = Widened(hn::Mul(next, next));
        if (at > 0) sum = hn::Add(sum, hn::Load(df, sums));
        hn::Store(sum, df, sums);
      }
      if constexpr (C::kNorm && !kFolded) v = Normalise(v, weight, rstd);
      if constexpr (kFolded) v = hn::Mul(v, Narrowed<D>(rstd));
      const VF partner = partners.Of(v);
      if constexpr (C::kReference) {
        v = hn::Add(Product(v, c), Product(partner, s));
      } else {
        v = hn::MulAdd(partner, s, hn::Mul(v, c));
      }
      output.Vector(span, begin, v);
    });
  }

  // Outside the rotated part: normalised, kBlocks blocks.
  template <int kBlocks, class Span>
  HWY_NOINLINE void NormaliseRest(Span span, const Run& run, int at) const {
    using D = typename Span::D;
    using VF = hn::Vec<D>;
    const D d;
    const float* weight = heads.weight + run.table + at;
    const VF weight_a = hn::Load(d, weight), weight_b = hn::Load(d, weight + kSecond<D>);
    const VF weight_c = hn::Load(d, weight + (kBlocks - 1) * kBlock);
    const VF weight_d = hn::Load(d, weight + (kBlocks - 1) * kBlock + kSecond<D>);
    const int first = run.begin + at, second = first + kBlock;
    const int64_t later = heads.prefetch, ahead = heads.next ? heads.next - heads.in : 0;
    Each<kTurnsOf<Span>>([&](const Raw* in, const auto& output, V rstd, float* sums) ROPEWALK_ATTR {
      VF a, b, c, e;
      Prefetch(in + first + later);
      LoadPair<T>(span, in + first, a, b);
      if constexpr (kBlocks == 2) {
        Prefetch(in + second + later);
        LoadPair<T>(span, in + second, c, e);
      }
      if (kFolded && ahead) {
        V sum = AddSquares<T, kNative>(span, in + first + ahead, hn::Load(df, sums));
        if constexpr (kBlocks == 2) sum = AddSquares<T, kNative>(span, in + second + ahead, sum);
        hn::Store(sum, df, sums);
      }
      a = Normalise(a, weight_a, rstd);
      b = Normalise(b, weight_b, rstd);
      if constexpr (kBlocks == 2) {
        output.Pairs(span, first, a, b, second, Normalise(c, weight_c, rstd), Normalise(e, weight_d, rstd));
      } else {
        output.Pair(span, first, a, b);
      }
    });
  }

  HWY_INLINE void All() const {
    const int length = parts.part[1].length, room = heads.head_dim - parts.part[1].begin;
    if constexpr (C::kInterleaved && T::kEvenOdd) {
      int at = 0;
      if constexpr (kSpans != kPartsOnly) {
        for (; at + 2 * kBlock <= length; at += 2 * kBlock) RotateWords<2>(Whole<DF>(), at);
      }
      EachPair<kSpans>(length, at, room, [&](auto span, int from) ROPEWALK_ATTR { RotateSome(span, from); });
    } else if (C::kInterleaved || parts.form == Form::kNatural) {
      EachVector<kSpans>(length, room, [&](auto span, int at) ROPEWALK_ATTR { RotateNatural(span, at); });
    } else if constexpr (!C::kInterleaved) {
      const int natural = NaturalTail<T>(length), pairs = length - natural;
      EachPair<kSpans>(pairs, 0, room - length, [&](auto span, int at) ROPEWALK_ATTR { RotateSome(span, at); });
      EachPair<kSpans, kLanes>(length, pairs, room - length,
                               [&](auto span, int at) ROPEWALK_ATTR { RotateHalfVectors(span, at); });
    }
    for (const Run* rest : {&parts.part[0], &parts.part[3]}) {
      if constexpr (C::kNorm) {
        int at = 0;
        if constexpr (kSpans != kPartsOnly) {
          for (; at + 2 * kBlock <= rest->length; at += 2 * kBlock) NormaliseRest<2>(Whole<DF>(), *rest, at);
        }
        EachPair<kSpans>(rest->length, at, 0,
                         [&](auto span, int from) ROPEWALK_ATTR { NormaliseRest<1>(span, *rest, from); });
      } else if (rest->length > 0 && (kStore || heads.in != heads.out)) {
        Each<1>([&](const Raw* in, const auto& output, V, float*) ROPEWALK_ATTR { output.Copy(in, *rest); });
      }
    }
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
