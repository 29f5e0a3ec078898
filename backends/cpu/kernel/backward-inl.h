// Part of rope-inl.h: the gradient of norm and rotation.
//
// With n = x / rms and y = R (n * w), where R turns each pair and multiplies it by the attention scaling:
//
//   g = R^T dY,    dX = (g w - n mean(g w n)) / rms,    dW = sum of g n over all heads of all tokens
//
// Heads are worked on as floats in natural order, in memory that stays in L1, and so one body serves every dtype and
// pairing: eight of them at once, so that their sums, roots and divisions wait for each other only once, and a weight
// is read and a weight's gradient added up once for all (one at a time heads of 64 in bfloat16 take 1.4 times as long,
// of 128 1.05 times). A thread adds up weights' gradients of a few heads as floats, and these as doubles: with more
// floats in a row, a million rows would show.
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

struct BackwardScratch {
  Scratch rope;                                   // angles and weights in natural order; the folded ones are not used
  alignas(64) float n[kMaxHeadDim + 4 * kLanes];  // x, of one head or one after the other of several
  alignas(64) float g[kMaxHeadDim + 4 * kLanes];  // dY of one
  alignas(64) float turned[kMaxHeadDim + 4 * kLanes];  // g, as x
  alignas(64) float sums[kMaxHeadDim + 4 * kLanes];    // of a few heads
  // As doubles, where the folded weights lie.
  double* q_totals() { return reinterpret_cast<double*>(rope.q_folded); }
  double* k_totals() { return reinterpret_cast<double*>(rope.k_folded); }
};
static_assert(sizeof(BackwardScratch) <= kCpuScratchBytes);

constexpr int kHeadsOfASum = 8;
// Heads at once, and as many bytes of theirs at most, as floats and in their tensors: half of L1.
constexpr int kHeadsAtOnce = kHeadsOfASum, kBytesAtOnce = 16384;
// Turns a head from `g` to `out`, which hold it in natural order and have room for a vector behind it.
HWY_NOINLINE void TurnHead(const rope_params& p, bool interleaved, const float* cos, const float* sin, const float* g,
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

// dX of a head of which n has x / rms; `along` is mean(g w n). kSums: adds g n to the sums. Of rstd what makes greater
// comes before the products: those of subnormal numbers would lose what it brings back.
template <class T, bool kSums>
HWY_INLINE void WriteGradient(int dim, const float* weight, const float* n, const float* g, V rstd, V along,
                              float* sums, typename T::Raw* out) {
  const V one = hn::Set(df, 1.0f), up = hn::Max(rstd, one), down = hn::Min(rstd, one), mean_along = hn::Mul(along, up);
  const auto work = [&](auto span, int i) ROPEWALK_ATTR {
    const V gi = hn::Load(df, g + i), ni = hn::Load(df, n + i);
    if constexpr (kSums) hn::Store(hn::MulAdd(gi, ni, hn::Load(df, sums + i)), df, sums + i);
    const V gw = hn::Mul(hn::Mul(gi, up), hn::Load(df, weight + i));
    T::template Store<false>(span, hn::Mul(hn::NegMulAdd(ni, mean_along, gw), down), out + i, 0);
  };
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) work(Whole<DF>(), i);
  if (i < dim) work(First<DF>{dim - i}, i);
}

// The gradient of one head, of which n has x; n gets x / rms. kSums: adds g n to the sums.
template <class T, bool kSums>
HWY_NOINLINE void HeadGradient(const rope_params& p, const float* weight, float* n, const float* g, float* sums,
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
  WriteGradient<T, kSums>(dim, weight, n, g, rstd, hn::Set(df, along), sums, out);
}

// The sums of the lanes of kHeadsAtOnce vectors, over head_dim.
HWY_INLINE void MeansOfHeads(const float* rows, float per_element, float* means) {
  for (int h = 0; h < kHeadsAtOnce; h += kLanes) {
    hn::StoreU(hn::Mul(SumsOfLanes(rows + h * kLanes), hn::Set(df, per_element)), df, means + h);
  }
}

// The same of `count` heads, kHeadsAtOnce at most, which lie `step` floats apart in n and g.
template <class T, bool kSums>
HWY_NOINLINE void HeadsGradient(const rope_params& p, const float* weight, float* n, const float* g, int step,
                                float* sums, typename T::Raw* out, int64_t out_step, int count) {
  const int dim = p.head_dim;
  const float per_element = 1.0f / static_cast<float>(dim);
  // As many rows as a vector has lanes are added up at once.
  constexpr int kRows = kHeadsAtOnce > kLanes ? kHeadsAtOnce : kLanes;
  alignas(64) float rows[kRows * kLanes] = {}, rstd[kRows], along[kRows];
  const auto add_up = [&](const auto& body) ROPEWALK_ATTR {
    for (int h = 0; h < count; ++h) {
      V even = hn::Zero(df), odd = even;
      int i = 0;
      for (; i + kLanes < dim; i += 2 * kLanes) {
        even = body(h, i, even);
        odd = body(h, i + kLanes, odd);
      }
      if (i < dim) even = body(h, i, even);
      hn::Store(hn::Add(even, odd), df, rows + h * kLanes);
    }
  };
  add_up([&](int h, int i, V sum) ROPEWALK_ATTR {
    const V x = hn::Load(df, n + h * step + i);
    return hn::MulAdd(x, x, sum);
  });
  MeansOfHeads(rows, per_element, rstd);
  for (int h = 0; h < kRows; h += kLanes) {
    const V mean = hn::Add(hn::Load(df, rstd + h), hn::Set(df, p.eps));
    hn::Store(hn::Div(hn::Set(df, 1.0f), hn::Sqrt(mean)), df, rstd + h);
  }
  add_up([&](int h, int i, V sum) ROPEWALK_ATTR {
    const V unit = hn::Mul(hn::Load(df, n + h * step + i), hn::Set(df, rstd[h]));
    hn::Store(unit, df, n + h * step + i);
    return hn::MulAdd(hn::Mul(hn::Load(df, g + h * step + i), hn::Load(df, weight + i)), unit, sum);
  });
  MeansOfHeads(rows, per_element, along);
  for (int h = 0; h < count; ++h, n += step, g += step, out += out_step) {
    WriteGradient<T, kSums>(dim, weight, n, g, hn::Set(df, rstd[h]), hn::Set(df, along[h]), sums, out);
  }
}

// Adds the sums of a few heads to the totals, and clears them.
HWY_NOINLINE void AddToTotals(int head_dim, float* sums, double* totals) {
  const hn::Repartition<double, DF> dd;
  const hn::Half<DF> half;
  constexpr int kDoubles = kLanes / 2;
  for (int i = 0; i < head_dim; i += kLanes) {
    const V sum = hn::Load(df, sums + i);
    hn::Store(hn::Add(hn::Load(dd, totals + i), hn::PromoteTo(dd, hn::LowerHalf(half, sum))), dd, totals + i);
    hn::Store(hn::Add(hn::Load(dd, totals + i + kDoubles), hn::PromoteTo(dd, hn::UpperHalf(half, sum))), dd,
              totals + i + kDoubles);
    hn::Store(hn::Zero(df), df, sums + i);
  }
}

// A double as two floats, which hold twice as many bits as one.
void StoreTotals(int head_dim, const double* totals, float* out) {
  for (int i = 0; i < head_dim; ++i) {
    const auto high = static_cast<float>(totals[i]);
    out[i] = high;
    out[head_dim + i] = std::isfinite(high) ? static_cast<float>(totals[i] - static_cast<double>(high)) : 0.0f;
  }
}

// The heads of q or of k.
struct GradientHeads {
  const void* x;
  const void* grad;
  void* out;
  rope_strides x_strides, grad_strides, out_strides;
  int64_t count;
  const float* weight;
  double* totals;  // null: the weight's gradient is not wanted
};

template <class T>
HWY_NOINLINE void GradientOfToken(const rope_params& p, bool interleaved, const GradientHeads& heads,
                                  const RowPlan& plan, BackwardScratch& scratch) {
  using Raw = typename T::Raw;
  const auto row = [&](const rope_strides& s) { return plan.batch * s.batch + plan.token * s.token; };
  const Raw* x = static_cast<const Raw*>(heads.x) + row(heads.x_strides);
  const Raw* grad = static_cast<const Raw*>(heads.grad) + row(heads.grad_strides);
  Raw* out = static_cast<Raw*>(heads.out) + row(heads.out_strides);
  const int step = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  // Float32 heads of 128 by themselves: together they take 3.4 ms for 2.5 (512 tokens of 32/8 heads).
  const bool alone = p.head_dim > kSquaresAtOnce || (sizeof(Raw) == 4 && step >= 128);
  const int fit = kBytesAtOnce / (step * (8 + 3 * static_cast<int>(sizeof(Raw))));
  const int at_once = alone ? 1 : HWY_MIN(kHeadsAtOnce, HWY_MAX(1, fit));
  int in_sums = 0;  // heads
  for (int64_t first = 0; first < heads.count; first += at_once) {
    const auto count = static_cast<int>(std::min<int64_t>(at_once, heads.count - first));
    for (int h = 0; h < count; ++h) {
      ConvertRow(x + (first + h) * heads.x_strides.head, T::kDtype, 1, p.head_dim, scratch.n + h * step);
      ConvertRow(grad + (first + h) * heads.grad_strides.head, T::kDtype, 1, p.head_dim, scratch.g);
      TurnHead(p, interleaved, scratch.rope.cos, scratch.rope.sin, scratch.g, scratch.turned + h * step);
    }
    Raw* const to = out + first * heads.out_strides.head;
    const auto gradient = [&](auto sums) ROPEWALK_ATTR {
      constexpr bool kSums = decltype(sums)::value;
      if (at_once == 1) {
        HeadGradient<T, kSums>(p, heads.weight, scratch.n, scratch.turned, scratch.sums, to);
      } else {
        HeadsGradient<T, kSums>(p, heads.weight, scratch.n, scratch.turned, step, scratch.sums, to,
                                heads.out_strides.head, count);
      }
    };
    if (!heads.totals) {
      gradient(std::false_type());
      continue;
    }
    gradient(std::true_type());
    in_sums += count;
    if (in_sums + at_once > kHeadsOfASum || first + count == heads.count) {
      AddToTotals(p.head_dim, scratch.sums, heads.totals);
      in_sums = 0;
    }
  }
}

template <class T>
HWY_NOINLINE void GradientOfRows(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                                 BackwardScratch& scratch, float* sums) {
  const RopeCall& turn = call.turn;
  const rope_params& p = turn.params;
  const RopeTensors& t = turn.tensors;
  // In natural order: a head of float32 of which everything lies before the rotated part, and pairs in two halves.
  Parts whole, halves;
  whole.part[0] = {0, p.head_dim, 0};
  halves.part[1] = halves.part[2] = {0, p.rotary_dim / 2, 0};
  FillWeights<F32, false>(turn, whole, t.q_weight, scratch.rope.q_weight);
  if (t.k) FillWeights<F32, false>(turn, whole, t.k_weight, scratch.rope.k_weight);
  if (turn.variant.table_dtype == kRopeNoDtype) FillTurns(turn, scratch.rope);

  GradientHeads q = {call.q, t.q, t.q_out, call.q_strides, p.q, p.q_out, p.q_heads, scratch.rope.q_weight, nullptr};
  GradientHeads k = {call.k, t.k, t.k_out, call.k_strides, p.k, p.k_out, p.k_heads, scratch.rope.k_weight, nullptr};
  if (call.q_weight_grad) q.totals = scratch.q_totals();
  if (call.k_weight_grad) k.totals = scratch.k_totals();
  const int size = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  for (double* totals : {q.totals, k.totals}) {
    if (totals) std::fill_n(totals, size, 0.0);
  }
  std::fill_n(scratch.sums, size, 0.0f);

  const bool interleaved = turn.variant.pairing == ROPEWALK_INTERLEAVED;
  for (int64_t row = begin; row < end; ++row) {
    const RowPlan plan = PlanRow(turn, row, scratch.rope.positions);
    if (plan.fault != kRopeFaultNone) {
      first_fault->Report(row, plan);
      FillToken<typename T::Raw>(t.q, t.q_out, p.q, p.q_out, plan, p.q_heads, p.head_dim, &T::kNan);
      if (t.k) FillToken<typename T::Raw>(t.k, t.k_out, p.k, p.k_out, plan, p.k_heads, p.head_dim, &T::kNan);
      continue;
    }
    FillCosSin<F32, false>(turn, plan, halves, scratch.rope);
    GradientOfToken<T>(p, interleaved, q, plan, scratch);
    if (t.k) GradientOfToken<T>(p, interleaved, k, plan, scratch);
  }
  for (const double* totals : {q.totals, k.totals}) {
    if (!totals) continue;
    StoreTotals(p.head_dim, totals, sums);
    sums += 2 * p.head_dim;
  }
}

void BackwardRows(const RopeBackwardCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                  void* scratch_memory, float* sums) {
  BackwardScratch& scratch = *static_cast<BackwardScratch*>(scratch_memory);
  switch (call.turn.variant.dtype) {
    case kRopeF32: return GradientOfRows<F32>(call, begin, end, first_fault, scratch, sums);
    case kRopeF16: return GradientOfRows<F16>(call, begin, end, first_fault, scratch, sums);
    default: return GradientOfRows<BF16>(call, begin, end, first_fault, scratch, sums);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
