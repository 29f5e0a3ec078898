// Part of rope-inl.h: the gradient of norm and rotation.
//
// With n = x / rms and y = R (n * w), where R turns each pair and multiplies it by the attention scaling:
//
//   g = R^T dY,    dX = (g w - n mean(g w n)) / rms,    dW = sum of g n over all heads of all tokens
//
// Heads go in two passes, several heads together, so that their roots and divisions wait for each other only once: the
// first turns dY, keeps g as floats in memory that stays in L1, and adds up x x and g w x; the second reads x and g
// again. Vectors have the order that loads cheapest, as in the forward kernel. Sums of x and not of n would lose what
// is very small or large: a head where that could show, and one too long for such sums, goes alone, as floats in
// natural order, each number scaled before it is multiplied. A thread adds up weights' gradients of a few heads as
// floats, and these as doubles: with more floats in a row, a million rows would show.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_BACKWARD_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_BACKWARD_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_BACKWARD_INL_H_
#endif

#include "backends/cpu/kernel/rope-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

// Heads at once, as the lanes of their sums are added up kLanes heads at a time; as many bytes of theirs at most, as
// floats and in their tensors, half of L1. AVX-512's 16 take 0.9 of the time of 8 for bfloat16 heads of 64, which leave
// a third of that free, and up to 1.04 for larger ones.
constexpr int kHeadsAtOnce = HWY_MAX(8, kLanes), kFewerAtOnce = 8, kBytesAtOnce = 16384;
// Whose products are added up as floats before they are added to doubles.
constexpr int kHeadsOfASum = 8;

// Of one head, by lanes.
struct HeadSums {
  alignas(64) float squares[kLanes], along[kLanes], sizes[kLanes], any[kLanes];
};

struct BackwardScratch {
  Scratch rope;  // angles and weights as the forward kernel reads them; the folded ones are not used
  alignas(64) float sums[kMaxHeadDim + 4 * kBlock];  // of a few heads, in that order, too
  alignas(64) float rows[kMaxHeadDim + 4 * kBlock];  // g of the heads of the first pass; of a head alone, x
  HeadSums head_sums[kHeadsAtOnce + kLanes];         // rows are added up kLanes at a time
  alignas(64) float rstd[kHeadsAtOnce + kLanes], mean_along[kHeadsAtOnce + kLanes];  // mean(g w n)
  // For heads alone, in natural order.
  alignas(64) float g[kMaxHeadDim + 4 * kLanes];       // dY, then what is added to the sums
  alignas(64) float turned[kMaxHeadDim + 4 * kLanes];  // g
  alignas(64) float weight[kMaxHeadDim + 8 * kBlock];
  alignas(64) float cos[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) float sin[kMaxHeadDim / 2 + 2 * kBlock];
  // As doubles, where the folded weights lie.
  double* q_totals() { return reinterpret_cast<double*>(rope.q_folded); }
  double* k_totals() { return reinterpret_cast<double*>(rope.k_folded); }
};
static_assert(sizeof(BackwardScratch) <= kCpuScratchBytes);

// Few heads go alone: their code is compiled for size.
#undef ROPEWALK_COLD
#define ROPEWALK_COLD __attribute__((cold, noinline))

// Turns a head from `g` to `out`, which hold it in natural order and have room for a vector behind it.
ROPEWALK_COLD void TurnHead(const rope_params& p, bool interleaved, const float* cos, const float* sin, const float* g,
                            float* out) {
  const int begin = p.rotary_offset, pairs = p.rotary_dim / 2, end = begin + p.rotary_dim;
  // Whole vectors are written: what they write too much is written again by the parts behind.
  for (int i = 0; i < begin; i += kLanes) hn::StoreU(hn::LoadU(df, g + i), df, out + i);
  const auto turn = [&](int i, V& x, V& y) ROPEWALK_ATTR {
    const V c = hn::Load(df, cos + i), s = hn::Load(df, sin + i), old = x;
    x = hn::NegMulAdd(y, s, hn::Mul(x, c));
    y = hn::MulAdd(old, s, hn::Mul(y, c));
  };
  if (interleaved) {
    for (int i = 0; i < pairs; i += kLanes) {
      V x, y;
      hn::LoadInterleaved2(df, g + begin + 2 * i, x, y);
      turn(i, x, y);
      hn::StoreInterleaved2(x, y, df, out + begin + 2 * i);
    }
  } else {
    // From the last to the first: the last x reaches into the ys.
    for (int i = (pairs - 1) / kLanes * kLanes; i >= 0; i -= kLanes) {
      V x = hn::LoadU(df, g + begin + i), y = hn::LoadU(df, g + begin + pairs + i);
      turn(i, x, y);
      hn::StoreU(x, df, out + begin + i);
      hn::StoreU(y, df, out + begin + pairs + i);
    }
  }
  for (int i = end; i < p.head_dim; i += kLanes) hn::StoreU(hn::LoadU(df, g + i), df, out + i);
  hn::StoreU(hn::Zero(df), df, out + p.head_dim);
}

HWY_INLINE float SumOf(V v) {
  alignas(64) float lanes[kLanes];
  hn::Store(v, df, lanes);
  return hn::GetLane(SumOfLanes(lanes));
}

// The sum of body(i) for the vectors of a head, in pieces whose error stays small.
template <class Body>
HWY_INLINE float SumOverHead(int head_dim, const Body& body) {
  float total = 0.0f;
  for (int begin = 0; begin < head_dim; begin += kSquaresAtOnce) {
    const int end = HWY_MIN(head_dim, begin + kSquaresAtOnce);
    V even = hn::Zero(df), odd = even;
    for (int i = begin; i < end; i += 2 * kLanes) {
      body(i, even);
      if (i + kLanes < end) body(i + kLanes, odd);
    }
    total += SumOf(hn::Add(even, odd));
  }
  return total;
}

// dX of a head of which n has x / rms; `along` is mean(g w n). Adds g n to the sums. Of rstd what makes greater comes
// before the products: those of subnormal numbers would lose what it brings back.
template <class T>
HWY_INLINE void WriteGradient(int dim, const float* weight, const float* n, const float* g, V rstd, V along,
                              float* sums, typename T::Raw* out) {
  const V one = hn::Set(df, 1.0f), up = hn::Max(rstd, one), down = hn::Min(rstd, one), mean_along = hn::Mul(along, up);
  const auto work = [&](auto span, int i) ROPEWALK_ATTR {
    const V gi = hn::Load(df, g + i), ni = hn::Load(df, n + i);
    hn::Store(hn::MulAdd(gi, ni, hn::Load(df, sums + i)), df, sums + i);
    const V gw = hn::Mul(hn::Mul(gi, up), hn::Load(df, weight + i));
    T::template Store<false>(span, hn::Mul(hn::NegMulAdd(ni, mean_along, gw), down), out + i, 0);
  };
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) work(Whole<DF>(), i);
  if (i < dim) work(First<DF>{dim - i}, i);
}

// The gradient of one head, of which n has x; n gets x / rms. Adds g n to the sums.
template <class T>
ROPEWALK_COLD void HeadGradient(const rope_params& p, const float* weight, float* n, const float* g, float* sums,
                                typename T::Raw* out) {
  const int dim = p.head_dim;
  const float per_element = 1.0f / static_cast<float>(dim);
  const float mean = SumOverHead(dim,
                                 [&](int i, V& sum) ROPEWALK_ATTR {
                                   const V x = hn::Load(df, n + i);
                                   sum = hn::MulAdd(x, x, sum);
                                 }) *
                         per_element +
                     p.eps;
  const float rms = 1.0f / std::sqrt(mean);
  const V rstd = hn::Set(df, rms);
  // n before its products: those of subnormal numbers would lose what the scale brings back.
  const float along = SumOverHead(dim,
                                  [&](int i, V& sum) ROPEWALK_ATTR {
                                    const V unit = hn::Mul(hn::Load(df, n + i), rstd);
                                    hn::Store(unit, df, n + i);
                                    sum = hn::MulAdd(hn::Mul(hn::Load(df, g + i), hn::Load(df, weight + i)), unit, sum);
                                  }) *
                      per_element;
  WriteGradient<T>(dim, weight, n, g, rstd, hn::Set(df, along), sums, out);
}

// Where the elements of a head lie in vectors of the forward kernel's order.
template <class T>
struct Places {
  const Parts& parts;

  // How many of a part's elements lie in pairs of vectors; those behind in single ones.
  HWY_INLINE int Paired(int part) const {
    if constexpr (!T::kEvenOdd) return 0;
    const int length = parts.part[part].length;
    if (part == 1 && parts.form == Form::kNatural) return 0;
    return length - (parts.form == Form::kSplit && (part == 1 || part == 2) ? NaturalTail<T>(length) : 0);
  }
  HWY_INLINE int size() const {
    const Run& last = parts.part[3];
    return last.table + (last.length + kBlock - 1) / kBlock * kBlock;
  }
  // Calls work(place of an element) from the head's first to its last.
  template <class Work>
  void Each(const Work& work) const {
    for (int part = 0; part < 4; ++part) {
      const Run& run = parts.part[part];
      const int paired = Paired(part);
      for (int i = 0; i < run.length; ++i) {
        const int block = i / kBlock * kBlock, rest = i - block;
        work(run.table + (i < paired ? block + rest % 2 * kLanes + rest / 2 : i));
      }
    }
  }
  // Calls pair(span, at) and single(span, at) for the vectors of a part.
  template <class Pair, class Single>
  HWY_INLINE void EachVectors(int part, const Pair& pair, const Single& single) const {
    const int length = parts.part[part].length, paired = Paired(part);
    int at = 0;
    if constexpr (T::kEvenOdd) {
      for (; at + kBlock <= paired; at += kBlock) pair(Whole<DF>(), at);
      if (at < paired) pair(First<DF>{paired - at}, at);
      at = paired;
    }
    for (; at + kLanes <= length; at += kLanes) single(Whole<DF>(), at);
    if (at < length) single(First<DF>{length - at}, at);
  }
};

// Some heads of a token.
template <class T>
struct HeadsTogether {
  const typename T::Raw *x, *grad;
  typename T::Raw* out;
  int64_t x_step, grad_step, out_step;
  const float* weight;
  int step, count;  // from a head's g to the next one's; heads
  bool interleaved;
};

// Asks for `count` elements of the heads that come next, to read or to write them. The processor does not see by itself
// where heads go on, as they are read a vector each in turn: with 31 MB of float32 heads of 96 a head took twice as
// long.
template <bool kWrite = false, class Raw>
HWY_INLINE void Ask(const Raw* begin, int count) {
  constexpr int kLine = static_cast<int>(64 / sizeof(Raw));
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(begin + i, kWrite);
}

// The first pass: g, the lanes of the sums of x x, g w x and |g w|, and whether any g is not 0. A vector, or pair of
// vectors, of all heads at a time: what is the same for all stays in registers, and short heads take no turns of their
// own.
template <class T>
HWY_NOINLINE void TurnAndAddUp(const Parts& parts, const HeadsTogether<T>& heads, BackwardScratch& scratch) {
  using Raw = typename T::Raw;
  const Places<T> places{parts};
  const float *cos = scratch.rope.cos, *sin = scratch.rope.sin, *weight = heads.weight;
  // Copies, which no store can alias: else each of them is read again for each head.
  const int count = heads.count;
  const int64_t x_step = heads.x_step, grad_step = heads.grad_step, g_step = heads.step;
  const int64_t next_x = count * x_step, next_grad = count * grad_step;
  const auto ask_next = [&](const Raw* x, const Raw* grad, int elements) ROPEWALK_ATTR {
    Ask(grad + next_grad, elements);
    Ask(x + next_x, elements);
  };
  bool fresh = true;
  // Calls work(x, dY, g, take) for each head, from its `begin`-th element and the place `a` of g on, which calls
  // take(vector of g, x, weight) for each of its vectors.
  const auto each_head = [&](int begin, int a, const auto& work) ROPEWALK_ATTR {
    const Raw *x = heads.x + begin, *grad = heads.grad + begin;
    float* g = scratch.rows + a;
    HeadSums* sums = scratch.head_sums;
    for (int h = 0; h < count; ++h, x += x_step, grad += grad_step, g += g_step, ++sums) {
      V squares = hn::Zero(df), along = squares, sizes = squares, any = squares;
      if (!fresh) {
        squares = hn::Load(df, sums->squares);
        along = hn::Load(df, sums->along);
        sizes = hn::Load(df, sums->sizes);
        any = hn::Load(df, sums->any);
      }
      work(x, grad, g, [&](V gi, V xi, V w) ROPEWALK_ATTR {
        const V gw = hn::Mul(gi, w);
        squares = hn::MulAdd(xi, xi, squares);
        along = hn::MulAdd(gw, xi, along);
        sizes = hn::Add(sizes, hn::Abs(gw));
        any = hn::Or(any, gi);
      });
      hn::Store(squares, df, sums->squares);
      hn::Store(along, df, sums->along);
      hn::Store(sizes, df, sums->sizes);
      hn::Store(hn::Abs(any), df, sums->any);
    }
    fresh = false;
  };
  const auto turn = [](V c, V s, V& a, V& b) ROPEWALK_ATTR {
    const V old = a;
    a = hn::NegMulAdd(b, s, hn::Mul(a, c));
    b = hn::MulAdd(old, s, hn::Mul(b, c));
  };
  const Run first = parts.part[1], second = parts.part[2];
  if (parts.form == Form::kSplit) {
    const int64_t to_second = second.begin - first.begin, to_b = second.table - first.table;
    places.EachVectors(
        1,
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = first.table + at, b = second.table + at;
          const V c0 = hn::Load(df, cos + at), s0 = hn::Load(df, sin + at);
          const V c1 = hn::Load(df, cos + at + kLanes), s1 = hn::Load(df, sin + at + kLanes);
          const V w0 = hn::Load(df, weight + a), w1 = hn::Load(df, weight + a + kLanes);
          const V w2 = hn::Load(df, weight + b), w3 = hn::Load(df, weight + b + kLanes);
          each_head(first.begin + at, a, [&](const Raw* x, const Raw* grad, float* g, const auto& take) ROPEWALK_ATTR {
            V g0, g1, g2, g3, x0, x1, x2, x3;
            LoadPair<T>(span, grad, g0, g1);
            LoadPair<T>(span, grad + to_second, g2, g3);
            LoadPair<T>(span, x, x0, x1);
            LoadPair<T>(span, x + to_second, x2, x3);
            ask_next(x, grad, kBlock);
            ask_next(x + to_second, grad + to_second, kBlock);
            turn(c0, s0, g0, g2);
            turn(c1, s1, g1, g3);
            hn::Store(g0, df, g);
            hn::Store(g1, df, g + kLanes);
            hn::Store(g2, df, g + to_b);
            hn::Store(g3, df, g + to_b + kLanes);
            take(g0, x0, w0);
            take(g1, x1, w1);
            take(g2, x2, w2);
            take(g3, x3, w3);
          });
        },
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = first.table + at, b = second.table + at;
          const V c = hn::Load(df, cos + at), s = hn::Load(df, sin + at);
          const V w0 = hn::Load(df, weight + a), w1 = hn::Load(df, weight + b);
          each_head(first.begin + at, a, [&](const Raw* x, const Raw* grad, float* g, const auto& take) ROPEWALK_ATTR {
            V g0 = T::Load(span, grad, 0), g1 = T::Load(span, grad + to_second, 0);
            ask_next(x, grad, kLanes);
            ask_next(x + to_second, grad + to_second, kLanes);
            turn(c, s, g0, g1);
            hn::Store(g0, df, g);
            hn::Store(g1, df, g + to_b);
            take(g0, T::Load(span, x, 0), w0);
            take(g1, T::Load(span, x + to_second, 0), w1);
          });
        });
  }
  const Partners<true, DF> neighbours(parts);
  const Partners<false, DF> partners(parts);
  for (const int part : {1, 0, 3}) {
    if (part == 1 && parts.form == Form::kSplit) continue;
    const Run run = parts.part[part];
    const bool turned = part == 1, interleaved = heads.interleaved;
    places.EachVectors(
        part,
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = run.table + at;
          const V c = hn::Load(df, cos + at / 2), s = hn::Load(df, sin + at / 2);
          const V w0 = hn::Load(df, weight + a), w1 = hn::Load(df, weight + a + kLanes);
          each_head(run.begin + at, a, [&](const Raw* x, const Raw* grad, float* g, const auto& take) ROPEWALK_ATTR {
            V g0, g1, x0, x1;
            LoadPair<T>(span, grad, g0, g1);
            LoadPair<T>(span, x, x0, x1);
            ask_next(x, grad, kBlock);
            if (turned) turn(c, s, g0, g1);
            hn::Store(g0, df, g);
            hn::Store(g1, df, g + kLanes);
            take(g0, x0, w0);
            take(g1, x1, w1);
          });
        },
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = run.table + at;
          const V c = hn::Load(df, cos + at), s = hn::Load(df, sin + at), w = hn::Load(df, weight + a);
          each_head(run.begin + at, a, [&](const Raw* x, const Raw* grad, float* g, const auto& take) ROPEWALK_ATTR {
            V v = T::Load(span, grad, 0);
            ask_next(x, grad, kLanes);
            if (turned) v = hn::MulAdd(interleaved ? neighbours.Of(v) : partners.Of(v), s, hn::Mul(v, c));
            hn::Store(v, df, g);
            take(v, T::Load(span, x, 0), w);
          });
        });
  }
}

// The second pass, of the heads from `begin` to `end`: dX. Adds g n to the sums, wanted or not.
template <class T, bool kNative>
HWY_NOINLINE void WriteHeads(const Parts& parts, const HeadsTogether<T>& heads, BackwardScratch& scratch, int begin,
                             int end) {
  using Raw = typename T::Raw;
  const Places<T> places{parts};
  const int64_t x_step = heads.x_step, out_step = heads.out_step, g_step = heads.step;  // copies, as above
  const int64_t next_out = heads.count * out_step;
  const float *rstds = scratch.rstd, *alongs = scratch.mean_along;
  // Calls work(x, g, dX, make) for each head, from its `first`-th element and the place `a` of g on.
  const auto each_head = [&](int first, int a, const auto& work) ROPEWALK_ATTR {
    const Raw* x = heads.x + begin * x_step + first;
    Raw* out = heads.out + begin * out_step + first;
    const float* g = scratch.rows + begin * g_step + a;
    for (int h = begin; h < end; ++h, x += x_step, out += out_step, g += g_step) {
      const V rstd = hn::Set(df, rstds[h]), along = hn::Set(df, alongs[h]);
      work(x, g, out, [&](V xi, V gi, V w, V& sum) ROPEWALK_ATTR {
        const V n = hn::Mul(xi, rstd);
        sum = hn::MulAdd(gi, n, sum);
        return hn::Mul(hn::NegMulAdd(n, along, hn::Mul(gi, w)), rstd);
      });
    }
  };
  for (int part = 0; part < 4; ++part) {
    const Run run = parts.part[part];
    places.EachVectors(
        part,
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = run.table + at, b = a + kLanes;
          const V w0 = hn::Load(df, heads.weight + a), w1 = hn::Load(df, heads.weight + b);
          V sum0 = hn::Load(df, scratch.sums + a), sum1 = hn::Load(df, scratch.sums + b);
          each_head(run.begin + at, a, [&](const Raw* x, const float* g, Raw* out, const auto& make) ROPEWALK_ATTR {
            V v0, v1;
            LoadPair<T>(span, x, v0, v1);
            v0 = make(v0, hn::Load(df, g), w0, sum0);
            v1 = make(v1, hn::Load(df, g + kLanes), w1, sum1);
            StorePair<T, kNative>(span, out, v0, v1);
            Ask<true>(out + next_out, kBlock);
          });
          hn::Store(sum0, df, scratch.sums + a);
          hn::Store(sum1, df, scratch.sums + b);
        },
        [&](auto span, int at) ROPEWALK_ATTR {
          const int a = run.table + at;
          const V w = hn::Load(df, heads.weight + a);
          V sum = hn::Load(df, scratch.sums + a);
          each_head(run.begin + at, a, [&](const Raw* x, const float* g, Raw* out, const auto& make) ROPEWALK_ATTR {
            const V v = make(T::Load(span, x, 0), hn::Load(df, g), w, sum);
            T::template Store<kNative>(span, v, out, 0);
            Ask<true>(out + next_out, kLanes);
          });
          hn::Store(sum, df, scratch.sums + a);
        });
  }
}

// SumsOfLanes of two times kLanes / 2 vectors, each in the lower half of the lanes and in the same order; above it
// is what the other has there.
template <int kStep>
HWY_INLINE void TwoSumsOfLanes(const float* rows, const float* others, V& sums, V& of_others) {
  const V a = SumsOfLanesOf<kLanes / 2, kStep>(rows), b = SumsOfLanesOf<kLanes / 2, kStep>(others);
  sums = hn::Add(hn::ConcatEven(df, b, a), hn::ConcatOdd(df, b, a));
  of_others = hn::ConcatLowerUpper(df, sums, sums);
}

// 1 / rms and mean(g w n) of some heads, of which the first pass was. A bit is set for each that is to go alone: no
// head's result depends on those beside it.
HWY_NOINLINE uint32_t FindRoots(const rope_params& p, int count, BackwardScratch& scratch) {
  // A product that is too small for a float loses 2^-150 at most, of which dX gets rstd^2 |n| and rstd times as much.
  // |n| is 2^5 at most (kSquaresAtOnce), and g w 2^27 times as large as would show beside that; or all of g is 0.
  // Masked and padded tokens and the small gradients of a mean over many tokens are usual; alone they take three times
  // as long.
  const V least = hn::Set(df, 0x1p-60f), most = hn::Set(df, 0x1p100f), least_size = hn::Set(df, 0x1p-100f);
  const V one = hn::Set(df, 1.0f);
  const V per_element = hn::Set(df, 1.0f / static_cast<float>(p.head_dim)), eps = hn::Set(df, p.eps);
  constexpr int kStep = static_cast<int>(sizeof(HeadSums) / sizeof(float));
  uint32_t alone = 0;
  for (int h = 0; h < count; h += kLanes) {
    const HeadSums& row = scratch.head_sums[h];
    V squares, products, sizes, any;
    if (2 * count <= kLanes) {  // half of the lanes are enough, and half of the shuffles
      TwoSumsOfLanes<kStep>(row.squares, row.along, squares, products);
      TwoSumsOfLanes<kStep>(row.sizes, row.any, sizes, any);
    } else {
      squares = SumsOfLanes<kStep>(row.squares);
      products = SumsOfLanes<kStep>(row.along);
      sizes = SumsOfLanes<kStep>(row.sizes);
      any = SumsOfLanes<kStep>(row.any);
    }
    const V mean = hn::MulAdd(squares, per_element, eps), root = hn::Div(one, hn::Sqrt(mean));
    const V along = hn::Mul(hn::Mul(products, per_element), root);
    const V size = hn::Mul(sizes, per_element);
    const auto no_g = hn::Eq(any, hn::Zero(df));
    const auto usual_x = hn::And(hn::Ge(mean, least), hn::Le(mean, most));
    const auto usual_g = hn::And(hn::Or(no_g, hn::Ge(size, hn::Mul(root, least_size))), hn::Le(size, most));
    const auto usual = hn::And(hn::And(usual_x, usual_g), hn::Le(hn::Abs(along), most));
    alignas(64) float unusual[kLanes];
    hn::Store(hn::IfThenZeroElse(usual, one), df, unusual);
    for (int i = 0; i < HWY_MIN(kLanes, count - h); ++i) {
      if (unusual[i] != 0.0f) alone |= uint32_t{1} << (h + i);
    }
    hn::Store(root, df, scratch.rstd + h);
    hn::Store(along, df, scratch.mean_along + h);
  }
  return alone;
}

// Adds the sums of a few heads to the totals, and clears them.
HWY_NOINLINE void AddToTotals(int size, float* sums, double* totals) {
  const hn::Repartition<double, DF> dd;
  const hn::Half<DF> half;
  constexpr int kDoubles = kLanes / 2;
  for (int i = 0; i < size; i += kLanes) {
    const V sum = hn::Load(df, sums + i);
    hn::Store(hn::Add(hn::Load(dd, totals + i), hn::PromoteTo(dd, hn::LowerHalf(half, sum))), dd, totals + i);
    hn::Store(hn::Add(hn::Load(dd, totals + i + kDoubles), hn::PromoteTo(dd, hn::UpperHalf(half, sum))), dd,
              totals + i + kDoubles);
    hn::Store(hn::Zero(df), df, sums + i);
  }
}

// Each double as two floats, which hold twice as many bits as one; `high` and `low` are room for them.
template <class T>
HWY_NOINLINE void StoreTotals(int head_dim, const Places<T>& places, const double* totals, float* high, float* low,
                              float* out) {
  const hn::Repartition<double, DF> dd;
  const hn::Half<DF> half;
  for (int i = 0; i < places.size(); i += kLanes / 2) {
    const auto total = hn::Load(dd, totals + i);
    const auto most = hn::DemoteTo(half, total);
    const auto rest = hn::DemoteTo(half, hn::Sub(total, hn::PromoteTo(dd, most)));
    hn::Store(most, half, high + i);
    hn::Store(hn::IfThenElseZero(hn::IsFinite(most), rest), half, low + i);
  }
  places.Each([&](int place) {
    out[head_dim] = low[place];
    *out++ = high[place];
  });
}

// The heads of q or of k.
struct GradientHeads {
  const void* x;
  const void* grad;
  void* out;
  rope_strides x_strides, grad_strides, out_strides;
  int64_t count;
  const void* given_weight;
  const float* weight;
  double* totals;  // null: the weight's gradient is not wanted
};

// What is the same for all tokens of a call, and what is known of one.
template <class T>
struct GradientRows {
  const RopeCall& turn;
  const Parts& parts;
  Places<T> places;
  BackwardScratch& scratch;
  bool alone;  // all heads
  RowPlan plan = {};
  bool has_natural_angles = false;

  // Cosines and sines in natural order, pairs in two halves, whatever the pairing; the others stay as they are.
  ROPEWALK_COLD void FillNaturalAngles() {
    if (has_natural_angles) return;
    Parts halves;
    halves.part[1] = halves.part[2] = {0, turn.params.rotary_dim / 2, 0};
    const int size = (turn.params.rotary_dim / 2 + kBlock - 1) / kBlock * kBlock;
    const auto swap = [&] {
      std::swap_ranges(scratch.cos, scratch.cos + size, scratch.rope.cos);
      std::swap_ranges(scratch.sin, scratch.sin + size, scratch.rope.sin);
    };
    swap();
    FillCosSin<F32, false>(turn, plan, halves, scratch.rope);
    swap();
    has_natural_angles = true;
  }
};

// A head alone.
template <class T>
ROPEWALK_COLD void GradientOfHeadAlone(GradientRows<T>& rows, bool interleaved, const GradientHeads& heads,
                                       const typename T::Raw* x, const typename T::Raw* grad, typename T::Raw* out) {
  const rope_params& p = rows.turn.params;
  BackwardScratch& scratch = rows.scratch;
  rows.FillNaturalAngles();
  Parts whole;
  whole.part[0] = {0, p.head_dim, 0};
  FillWeights<F32, false>(rows.turn, whole, heads.given_weight, scratch.weight);
  ConvertRow(x, T::kDtype, 1, p.head_dim, scratch.rows);
  ConvertRow(grad, T::kDtype, 1, p.head_dim, scratch.g);
  TurnHead(p, interleaved, scratch.cos, scratch.sin, scratch.g, scratch.turned);
  std::fill_n(scratch.g, (p.head_dim + kLanes - 1) / kLanes * kLanes, 0.0f);
  HeadGradient<T>(p, scratch.weight, scratch.rows, scratch.turned, scratch.g, out);
  const float* sum = scratch.g;
  rows.places.Each([&](int place) { scratch.sums[place] += *sum++; });
}

template <class T, bool kNative>
HWY_NOINLINE void GradientOfToken(GradientRows<T>& rows, bool interleaved, const GradientHeads& heads) {
  using Raw = typename T::Raw;
  const rope_params& p = rows.turn.params;
  const auto row = [&](const rope_strides& s) { return rows.plan.batch * s.batch + rows.plan.token * s.token; };
  const Raw* x = static_cast<const Raw*>(heads.x) + row(heads.x_strides);
  const Raw* grad = static_cast<const Raw*>(heads.grad) + row(heads.grad_strides);
  Raw* out = static_cast<Raw*>(heads.out) + row(heads.out_strides);
  const int step = rows.places.size();
  const int fit = kBytesAtOnce / (step * (4 + 3 * static_cast<int>(sizeof(Raw))));
  const int at_once = rows.alone                    ? 1
                      : 3 * fit >= 4 * kHeadsAtOnce ? kHeadsAtOnce
                                                    : HWY_MIN(kFewerAtOnce, HWY_MAX(1, fit));
  int in_sums = 0;  // heads
  for (int64_t first = 0; first < heads.count; first += at_once) {
    const auto count = static_cast<int>(std::min<int64_t>(at_once, heads.count - first));
    const Raw* const from = x + first * heads.x_strides.head;
    const Raw* const of = grad + first * heads.grad_strides.head;
    Raw* const to = out + first * heads.out_strides.head;
    const HeadsTogether<T> together = {
        from,         of,   to,    heads.x_strides.head, heads.grad_strides.head, heads.out_strides.head,
        heads.weight, step, count, interleaved};
    if (!rows.alone) TurnAndAddUp<T>(rows.parts, together, rows.scratch);
    const uint32_t alone = rows.alone ? 1 : FindRoots(p, count, rows.scratch);
    for (int begin = 0, end; begin < count; begin = end) {
      end = HWY_MIN(count, begin + kHeadsOfASum);
      for (int h = begin, next; h < end; h = next + 1) {
        for (next = h; next < end && !(alone >> next & 1);) ++next;
        if (h < next) WriteHeads<T, kNative>(rows.parts, together, rows.scratch, h, next);
      }
      for (int h = begin; h < end; ++h) {
        if (!(alone >> h & 1)) continue;
        GradientOfHeadAlone<T>(rows, interleaved, heads, from + h * heads.x_strides.head,
                               of + h * heads.grad_strides.head, to + h * heads.out_strides.head);
      }
      in_sums += end - begin;
      if (heads.totals && (in_sums + HWY_MIN(at_once, kHeadsOfASum) > kHeadsOfASum || first + end == heads.count)) {
        AddToTotals(step, rows.scratch.sums, heads.totals);
        in_sums = 0;
      }
    }
  }
  if (!heads.totals) std::fill_n(rows.scratch.sums, step, 0.0f);  // they are not the next ones'
}

template <class T, bool kNative>
HWY_NOINLINE void GradientOfRows(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                                 void* memory, float* sums) {
  BackwardScratch& scratch = *static_cast<BackwardScratch*>(memory);
  const RopeCall& turn = call.turn;
  const rope_params& p = turn.params;
  const RopeTensors& t = turn.tensors;
  const bool interleaved = turn.variant.pairing == ROPEWALK_INTERLEAVED;
  const Parts parts = interleaved ? MakeParts<T, true>(p) : MakeParts<T, false>(p);
  // Of the layout of weights `parts` says all.
  FillWeights<T, false>(turn, parts, t.q_weight, scratch.rope.q_weight);
  if (t.k) FillWeights<T, false>(turn, parts, t.k_weight, scratch.rope.k_weight);
  if (turn.variant.table_dtype == kRopeNoDtype) FillTurns(turn, scratch.rope);

  GradientHeads q = {call.q,  t.q,       t.q_out,    call.q_strides,        p.q,
                     p.q_out, p.q_heads, t.q_weight, scratch.rope.q_weight, nullptr};
  GradientHeads k = {call.k,  t.k,       t.k_out,    call.k_strides,        p.k,
                     p.k_out, p.k_heads, t.k_weight, scratch.rope.k_weight, nullptr};
  if (call.q_weight_grad) q.totals = scratch.q_totals();
  if (call.k_weight_grad) k.totals = scratch.k_totals();
  GradientRows<T> rows = {turn, parts, {parts}, scratch, p.head_dim > kSquaresAtOnce};
  for (double* totals : {q.totals, k.totals}) {
    if (totals) std::fill_n(totals, rows.places.size(), 0.0);
  }
  std::fill_n(scratch.sums, rows.places.size(), 0.0f);

  for (int64_t row = begin; row < end; ++row) {
    const RowPlan plan = PlanRow(turn, row, scratch.rope.positions);
    if (plan.fault != kRopeFaultNone) {
      first_fault->Report(row, plan);
      FillToken<typename T::Raw>(t.q, t.q_out, p.q, p.q_out, plan, p.q_heads, p.head_dim, &T::kNan);
      if (t.k) FillToken<typename T::Raw>(t.k, t.k_out, p.k, p.k_out, plan, p.k_heads, p.head_dim, &T::kNan);
      continue;
    }
    rows.plan = plan;
    rows.has_natural_angles = false;
    if (!rows.alone && interleaved) FillCosSin<T, true>(turn, plan, parts, scratch.rope);
    if (!rows.alone && !interleaved) FillCosSin<T, false>(turn, plan, parts, scratch.rope);
    GradientOfToken<T, kNative>(rows, interleaved, q);
    if (t.k) GradientOfToken<T, kNative>(rows, interleaved, k);
  }
  for (const double* totals : {q.totals, k.totals}) {
    if (!totals) continue;
    StoreTotals<T>(p.head_dim, rows.places, totals, scratch.sums, scratch.rows, sums);
    sums += 2 * p.head_dim;
  }
}

void BackwardRows(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault, void* scratch,
                  float* sums) {
  switch (call.turn.variant.dtype) {
    case kRopeF32: return GradientOfRows<F32, false>(call, begin, end, first_fault, scratch, sums);
    case kRopeF16: return GradientOfRows<F16, false>(call, begin, end, first_fault, scratch, sums);
    default: return GradientOfRows<BF16, false>(call, begin, end, first_fault, scratch, sums);
  }
}

#if HWY_TARGET == HWY_AVX3
// With the CPU's own bfloat16 rounding.
void BackwardRowsBf16(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault, void* scratch,
                      float* sums) {
  if (call.turn.variant.dtype != kRopeBF16) return BackwardRows(call, begin, end, first_fault, scratch, sums);
  GradientOfRows<BF16, true>(call, begin, end, first_fault, scratch, sums);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
