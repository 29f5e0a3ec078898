// Part of rope-inl.h: 1 / rms of the heads.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_NORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_NORM_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_NORM_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_NORM_INL_H_
#endif

#include "backends/cpu/kernel/tables-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

// One configuration of the kernel.
template <class T_, bool kInterleaved_, bool kNorm_, bool kReference_>
struct Config {
  using T = T_;
  using Raw = typename T::Raw;
  static constexpr bool kInterleaved = kInterleaved_;
  static constexpr bool kNorm = kNorm_;
  static constexpr bool kReference = kReference_;
};

// The heads of q or of k of one token, and what is the same for all of them.
template <class T>
struct Heads {
  using Raw = typename T::Raw;
  const Raw* in;
  Raw* out;                                           // null: only stored, as fp8
  void* cache;                                        // null: not stored
  const float* scale;                                 // of an fp8 cache, by head; null: `scale_value`
  int64_t in_head, out_head, cache_head, scale_head;  // strides
  int64_t prefetch;                                   // from a head to the one fetched ahead; 0: none
  int64_t count;
  int64_t at_once;  // whose 1 / rms is made together
  int head_dim;
  const Parts* parts;
  const float* cos;
  const float* sin;
  const float* weight;
  float* folded;    // room for FoldWeights
  float* rstd;      // 1 / rms of the heads that are next
  float* squares;   // what SquaresOf gives for the heads at `next`, filled while these are rotated
  const Raw* next;  // the heads of the next token; null: nothing is filled
  float eps, scale_value;
  uint8_t cache_dtype;
  bool zero_centered;
  bool round_products;  // reference rounding, in the dtype of the tensors rather than in float32
};

// `sums` and the squares of a part of a head, in any lanes. kNative takes subnormal numbers for zero, whose squares are
// that anyway.
template <class T, bool kNative, class Span>
HWY_INLINE V AddSquares(Span span, const typename T::Raw* p, V sums) {
  using D = typename Span::D;
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {
    const auto words = LoadFrom(span, Words<D>(), p, 0);
    if constexpr (sizeof(words.raw) == 64) {
      const auto pairs = reinterpret_cast<__m512bh>(words.raw);
      sums.raw = _mm512_dpbf16_ps(sums.raw, pairs, pairs);
      return sums;
    } else {
      const auto pairs = reinterpret_cast<__m256bh>(words.raw);
      hn::Vec<D> part = hn::Zero(D());
      part.raw = _mm256_dpbf16_ps(part.raw, pairs, pairs);
      return hn::Add(sums, Widened(part));
    }
  }
#endif
  hn::Vec<D> a, b;
  LoadPair<T>(span, p, a, b);
  if constexpr (hn::MaxLanes(D()) == kLanes) {
    return hn::MulAdd(a, a, hn::MulAdd(b, b, sums));
  } else {
    return hn::Add(sums, Widened(hn::MulAdd(a, a, hn::Mul(b, b))));
  }
}

// So many squares are added one to the other; with 8,192 the error of a float32 sum would reach the result.
constexpr int kSquaresAtOnce = 1024;

// The squares of up to so many elements; what is left to add up is the lanes.
template <class T, bool kNative>
HWY_INLINE V SquaresOfPiece(const typename T::Raw* head, int count) {
  V even = hn::Zero(df), odd = even;
  int i = 0;
  for (; i + 2 * kBlock <= count; i += 2 * kBlock) {
    even = AddSquares<T, kNative>(Whole<DF>(), head + i, even);
    odd = AddSquares<T, kNative>(Whole<DF>(), head + i + kBlock, odd);
  }
  if (i + kBlock <= count) {
    even = AddSquares<T, kNative>(Whole<DF>(), head + i, even);
    i += kBlock;
  }
  if (i < count) odd = AddSquares<T, kNative>(First<DF>{count - i}, head + i, odd);
  return hn::Add(even, odd);
}

// The squares of a head.
template <class T, bool kNative>
HWY_INLINE V SquaresOf(const typename T::Raw* head, int count) {
  V sum = SquaresOfPiece<T, kNative>(head, std::min(count, kSquaresAtOnce));
  for (int i = kSquaresAtOnce; i < count; i += kSquaresAtOnce) {
    sum = hn::Add(sum, SquaresOfPiece<T, kNative>(head + i, std::min(count - i, kSquaresAtOnce)));
  }
  return sum;
}

// The sums of kLanes / kRows lanes that lie together, of each of kRows vectors, which lie kStep floats apart.
template <int kRows, int kStep>
HWY_INLINE V SumsOfLanesOf(const float* rows) {
  if constexpr (kRows == 1) {
    return hn::Load(df, rows);
  } else {
    const V a = SumsOfLanesOf<kRows / 2, kStep>(rows), b = SumsOfLanesOf<kRows / 2, kStep>(rows + kRows / 2 * kStep);
    return hn::Add(hn::ConcatEven(df, b, a), hn::ConcatOdd(df, b, a));
  }
}

// The sum of the lanes of each of kLanes vectors; that of one, in the same order and in every lane.
template <int kStep = kLanes>
HWY_INLINE V SumsOfLanes(const float* rows) {
  return SumsOfLanesOf<kLanes, kStep>(rows);
}
HWY_INLINE V SumOfLanes(const float* row) {
  V sum = hn::Load(df, row);
  HWY_UNROLL(4)
  for (int lanes = kLanes; lanes > 1; lanes /= 2) {
    sum = hn::Add(hn::ConcatEven(df, sum, sum), hn::ConcatOdd(df, sum, sum));
  }
  return sum;
}
constexpr int kFewHeads = 4;  // for which one at a time is faster

// The sum of squares in the order in which torch adds on the CPU, so that reference rounding gives its bits: four
// accumulators of eight lanes take groups of eight in turn (what is left after whole rounds goes to the first), then
// the accumulators are added, then their lanes.
template <class T>
HWY_NOINLINE float SumOfSquaresLikeTorch(const typename T::Raw* head, int count) {
  constexpr int kPiece = 512;  // of a head that may be longer than a small stack
  alignas(64) float values[kPiece + kBlock];
  float sums[4][8] = {};
  const int rounds = count / 32 * 32, groups = count / 8 * 8, last = groups / kPiece * kPiece;
  for (int begin = 0; begin <= last; begin += kPiece) {
    ConvertRow(head + begin, T::kDtype, 1, std::min(kPiece, count - begin), values);
    for (int i = begin; i < std::min(begin + kPiece, groups); i += 8) {
      float* sum = sums[i < rounds ? i / 8 % 4 : 0];
      for (int j = 0; j < 8; ++j) sum[j] += values[i - begin + j] * values[i - begin + j];
    }
  }
  float total = 0.0f;
  for (int j = 0; j < 8; ++j) {
    const float lane = sums[0][j] + sums[1][j] + sums[2][j] + sums[3][j];
    total = j ? total + lane : lane;
  }
  for (int i = groups; i < count; ++i) total += values[i - last] * values[i - last];
  return total;
}

// 1 / rms of `count` heads, at most kNormedAtOnce, of which `heads.squares` has what SquaresOf gives.
template <class T, bool kNative>
HWY_NOINLINE void RstdsOfSquares(const Heads<T>& heads, int64_t count) {
  const V per_element = hn::Set(df, 1.0f / static_cast<float>(heads.head_dim)), eps = hn::Set(df, heads.eps);
  const bool few = count < kFewHeads;
  for (int64_t h = 0; h < count; h += few ? 1 : kLanes) {
    const float* rows = heads.squares + h * kLanes;
    const V mean = hn::Add(hn::Mul(few ? SumOfLanes(rows) : SumsOfLanes(rows), per_element), eps);
    V rstd;
    if constexpr (kNative) {
      // 14 bits, then one of Newton's steps: 2^-22 at most, in a third of the time of a root and a division.
      const V guess = hn::ApproximateReciprocalSqrt(mean);
      const V error = hn::NegMulAdd(hn::Mul(mean, guess), guess, hn::Set(df, 1.0f));
      rstd = hn::MulAdd(hn::Mul(guess, hn::Set(df, 0.5f)), error, guess);
      rstd = hn::IfThenZeroElse(hn::Eq(mean, hn::Inf(df)), rstd);
    } else {
      rstd = hn::Div(hn::Set(df, 1.0f), hn::Sqrt(mean));
    }
    hn::StoreU(rstd, df, heads.rstd + h);
  }
}

// The same of `count` heads from `in` on.
template <class C, bool kNative>
HWY_NOINLINE void Rstds(const Heads<typename C::T>& heads, const typename C::Raw* in, int64_t count) {
  using T = typename C::T;
  for (int64_t h = 0; h < count; ++h, in += heads.in_head) {
    if constexpr (C::kReference) {
      const float mean = SumOfSquaresLikeTorch<T>(in, heads.head_dim) / static_cast<float>(heads.head_dim);
      heads.rstd[h] = 1.0f / std::sqrt(mean + heads.eps);
    } else {
      hn::Store(SquaresOf<T, kNative>(in, heads.head_dim), df, heads.squares + h * kLanes);
    }
  }
  if constexpr (!C::kReference) RstdsOfSquares<T, kNative>(heads, count);
}

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
