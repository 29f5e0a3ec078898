// Part of rope-inl.h: what is the same for all heads of a token, laid out as they read it: the parts of a head, cosines
// and sines, weights.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_TABLES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_TABLES_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_TABLES_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_TABLES_INL_H_
#endif

#include "backends/cpu/kernel/dtypes-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

constexpr int kMaxHeadDim = 8192;

// How the rotated part of a head lies in vectors.
enum class Form : uint8_t {
  kSplit,    // neox: x and y in pairs of vectors of their own
  kWords,    // interleaved bfloat16: x and y are the even and the odd elements of a pair of vectors
  kNatural,  // one vector after the other in natural order, partners by a shuffle: other interleaved ones, and neox
             // where one vector holds the whole part
};

template <class T, bool kInterleaved>
HWY_INLINE Form FormOf(int rotary_dim) {
  if constexpr (kInterleaved) return T::kEvenOdd ? Form::kWords : Form::kNatural;
  return rotary_dim <= kLanes ? Form::kNatural : Form::kSplit;
}

// The last elements of each of the halves, behind whole blocks, that are worked on by single vectors in natural order:
// of bfloat16 only where pairs of vectors would be half empty.
template <class T>
HWY_INLINE int NaturalTail(int length) {
  const int tail = length % kBlock;
  return !T::kEvenOdd || (kHasNarrow && tail <= kLanes / 2) ? tail : 0;
}

// A run of a head's elements that is treated alike.
struct Run {
  int begin = 0, length = 0;
  int table = 0;  // where its weights begin, in whole blocks
};

// A head: before the rotated part, the rotated part (kSplit: its halves), behind it.
struct Parts {
  Run part[4];
  Form form = Form::kSplit;
  alignas(64) int32_t partners[kLanes] = {};  // of the elements of neox, kNatural
};

template <class T, bool kInterleaved>
HWY_INLINE Parts MakeParts(const rope_params& p) {
  Parts parts;
  parts.form = FormOf<T, kInterleaved>(p.rotary_dim);
  const int half = p.rotary_dim / 2;
  const bool split = parts.form == Form::kSplit;
  const int lengths[4] = {p.rotary_offset, split ? half : p.rotary_dim, split ? half : 0,
                          p.head_dim - p.rotary_offset - p.rotary_dim};
  int begin = 0, table = 0;
  for (int i = 0; i < 4; ++i) {
    parts.part[i] = {begin, lengths[i], table};
    begin += lengths[i];
    table += (lengths[i] + kBlock - 1) / kBlock * kBlock;
  }
  if (!kInterleaved && !split) {
    for (int i = 0; i < kLanes; ++i) parts.partners[i] = i < half ? i + half : i < 2 * half ? i - half : i;
  }
  return parts;
}

// Heads whose 1 / rms is made before the first of them is rotated, so that no rotation waits for a sum, a square root
// and a division: at most so many, and as many bytes as stay in L1 twice.
constexpr int64_t kNormedAtOnce = 128;
constexpr int64_t kNormedBytes = 12288;

// What a thread keeps beside the tensors. Large enough for every head_dim; only what is used is touched.
struct Scratch {
  int64_t positions[kMaxHeadDim / 2];  // see PlanRow
  alignas(64) float cos[kMaxHeadDim + 2 * kBlock];
  alignas(64) float sin[kMaxHeadDim + 2 * kBlock];
  alignas(64) float cos_row[kMaxHeadDim / 2 + 2 * kBlock];  // of the caller's table, in natural order
  alignas(64) float sin_row[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) float q_weight[kMaxHeadDim + 8 * kBlock];
  alignas(64) float k_weight[kMaxHeadDim + 8 * kBlock];
  alignas(64) float q_folded[2 * kMaxHeadDim + 8 * kBlock];  // cosines and sines times weights: four of each pair
  alignas(64) float k_folded[2 * kMaxHeadDim + 8 * kBlock];
  alignas(64) float q_rstd[kNormedAtOnce + kLanes];
  alignas(64) float k_rstd[kNormedAtOnce + kLanes];
  alignas(64) float q_squares[kNormedAtOnce * kLanes];
  alignas(64) float k_squares[kNormedAtOnce * kLanes];
  alignas(64) uint32_t turns_low[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) uint32_t turns_high[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) uint32_t position_low[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) uint32_t position_high[kMaxHeadDim / 2 + 2 * kBlock];
};
static_assert(sizeof(Scratch) <= kCpuScratchBytes);

// `count` elements of a tensor as floats, in natural order; writes whole vectors, zeros behind the last.
HWY_INLINE void ConvertRow(const void* data, uint8_t dtype, int64_t stride, int count, float* out) {
  const auto convert = [&](auto tag) ROPEWALK_ATTR {
    using T = decltype(tag);
    const auto* p = static_cast<const typename T::Raw*>(data);
    int i = 0;
    if (stride == 1) {
      for (; i + kLanes <= count; i += kLanes) hn::StoreU(T::Load(Whole<DF>(), p, i), df, out + i);
      if (i < count) hn::StoreU(T::Load(First<DF>{count - i}, p + i, 0), df, out + i);
      return;
    }
    for (; i < count; i += kLanes) {
      typename T::Raw row[kLanes] = {};
      for (int j = 0; j < HWY_MIN(kLanes, count - i); ++j) row[j] = p[(i + j) * stride];
      hn::StoreU(T::Load(Whole<DF>(), row, 0), df, out + i);
    }
  };
  switch (dtype) {
    case kRopeF32: return convert(F32());
    case kRopeF16: return convert(F16());
    default: return convert(BF16());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Angles

// cos and sin of a phase: a turn is 2^32. Reduced to an eighth of a turn on either side, then polynomials whose
// coefficients were fitted to the sine and cosine there (largest errors 2^-28.7 and 2^-30.8 before rounding).
HWY_INLINE void CosSin(VU phase, V& cosine, V& sine) {
  const VU quadrant = hn::ShiftRight<30>(hn::Add(phase, hn::Set(du, 1u << 29)));
  const auto rest = hn::BitCast(hn::RebindToSigned<DF>(), hn::Sub(phase, hn::ShiftLeft<30>(quadrant)));
  const V x = hn::Mul(hn::ConvertTo(df, rest), hn::Set(df, ROPE_ANGLE_OF_PHASE));
  const V x2 = hn::Mul(x, x);
  V s = hn::MulAdd(hn::Set(df, ROPE_SIN7), x2, hn::Set(df, ROPE_SIN5));
  s = hn::MulAdd(s, x2, hn::Set(df, ROPE_SIN3));
  s = hn::MulAdd(hn::Mul(s, x2), x, x);
  V c = hn::MulAdd(hn::Set(df, ROPE_COS8), x2, hn::Set(df, ROPE_COS6));
  c = hn::MulAdd(c, x2, hn::Set(df, ROPE_COS4));
  c = hn::MulAdd(c, x2, hn::Set(df, -0.5f));
  c = hn::MulAdd(c, x2, hn::Set(df, 1.0f));
  const auto swap = hn::RebindMask(df, hn::Ne(hn::And(quadrant, hn::Set(du, 1u)), hn::Zero(du)));
  const VU sin_sign = hn::ShiftLeft<30>(hn::And(quadrant, hn::Set(du, 2u)));
  const VU cos_sign = hn::ShiftLeft<30>(hn::And(hn::Add(quadrant, hn::Set(du, 1u)), hn::Set(du, 2u)));
  cosine = hn::Xor(hn::IfThenElse(swap, s, c), hn::BitCast(df, cos_sign));
  sine = hn::Xor(hn::IfThenElse(swap, c, s), hn::BitCast(df, sin_sign));
}

// The upper half of position * turns modulo 2^64, from halves of 32 bits.
HWY_INLINE VU Phase(VU position_low, VU position_high, VU turns_low, VU turns_high) {
  const auto even = hn::MulEven(position_low, turns_low);
  const hn::Repartition<uint64_t, DU> d64;
  const auto odd = hn::MulEven(hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(d64, position_low))),
                               hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(d64, turns_low))));
  const auto high_odd = hn::And(odd, hn::Set(d64, 0xffffffff00000000ull));
  const VU high = hn::BitCast(du, hn::Or(hn::ShiftRight<32>(even), high_odd));
  return hn::Add(high, hn::Add(hn::Mul(position_low, turns_high), hn::Mul(position_high, turns_low)));
}

HWY_INLINE V RoundTo(uint8_t dtype, V v) {
  return dtype == kRopeF32 ? v : dtype == kRopeF16 ? F16::Round(v) : BF16::Round(v);
}

// The halves of the frequencies' turns, zeros up to a whole block.
HWY_NOINLINE void FillTurns(const RopeCall& call, Scratch& scratch) {
  const int pairs = call.params.rotary_dim / 2;
  const uint64_t* turns = call.frequencies->turns.data();
  int i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    VU low, high;
    hn::LoadInterleaved2(du, reinterpret_cast<const uint32_t*>(turns + i), low, high);
    hn::Store(low, du, scratch.turns_low + i);
    hn::Store(high, du, scratch.turns_high + i);
  }
  for (; i < (pairs + kBlock - 1) / kBlock * kBlock; ++i) {
    scratch.turns_low[i] = i < pairs ? static_cast<uint32_t>(turns[i]) : 0;
    scratch.turns_high[i] = i < pairs ? static_cast<uint32_t>(turns[i] >> 32) : 0;
  }
}

// Puts the cosines, or the sines, of the pairs from `i` on where the heads read them: kLanes of them or twice as many.
// kSine: what multiplies x, the first of a pair, is negative where both are in one vector.
template <class T, bool kInterleaved, bool kSine>
HWY_INLINE void PutAngles(const Parts& parts, int i, V low, V high, float* out) {
  const auto negative = [](V v) ROPEWALK_ATTR { return kSine ? hn::Neg(v) : v; };
  if constexpr (kInterleaved && !T::kEvenOdd) {
    hn::StoreInterleaved2(negative(low), low, df, out + 2 * i);
    hn::StoreInterleaved2(negative(high), high, df, out + 2 * i + kBlock);
    return;
  } else if constexpr (!kInterleaved) {
    if (parts.form == Form::kNatural) {
      hn::Store(negative(low), df, out);
      hn::StoreU(low, df, out + parts.part[1].length / 2);
      return;
    }
    const int half = parts.part[1].length;
    if (T::kEvenOdd && i < half - NaturalTail<T>(half)) {
      hn::Store(hn::ConcatEven(df, high, low), df, out + i);
      hn::Store(hn::ConcatOdd(df, high, low), df, out + i + kLanes);
      return;
    }
  }
  hn::Store(low, df, out + i);
  hn::Store(high, df, out + i + kLanes);
}

// Cosines and sines of a token.
template <class T, bool kInterleaved>
HWY_NOINLINE void FillCosSin(const RopeCall& call, const RowPlan& plan, const Parts& parts, Scratch& scratch) {
  const rope_params& p = call.params;
  const int pairs = p.rotary_dim / 2;
  const bool axes = call.variant.axes != 0;
  const int64_t* positions = scratch.positions;
  // Of each block of kBlock pairs; where it is but a vector, that twice.
  const auto put = [&](auto cos_sin) ROPEWALK_ATTR {
    for (int i = 0; i < pairs; i += kBlock) {
      V cos_low, sin_low;
      cos_sin(i, cos_low, sin_low);
      V cos_high = cos_low, sin_high = sin_low;
      if (pairs - i > kLanes) cos_sin(i + kLanes, cos_high, sin_high);
      PutAngles<T, kInterleaved, false>(parts, i, cos_low, cos_high, scratch.cos);
      PutAngles<T, kInterleaved, true>(parts, i, sin_low, sin_high, scratch.sin);
    }
  };

  if (call.variant.table_dtype != kRopeNoDtype) {
    const int64_t bytes = call.variant.table_dtype == kRopeF32 ? 4 : 2;
    const auto at = [&](const void* table, int64_t batch, int64_t row_stride, int64_t row, int64_t pair) {
      return static_cast<const char*>(table) + (plan.batch * batch + row * row_stride + pair) * bytes;
    };
    // A run of pairs at one position at a time; without axes that is all.
    for (int i = 0; i < pairs;) {
      int end = pairs;
      const int64_t row = axes ? positions[i] : plan.position;
      if (axes) {
        for (end = i + 1; end < pairs && positions[end] == row;) ++end;
      }
      // ConvertRow writes whole vectors: what it writes too much the next run overwrites.
      ConvertRow(at(call.tensors.cos, p.cos_batch, p.cos_row, row, i * p.cos_pair), call.variant.table_dtype,
                 p.cos_pair, end - i, scratch.cos_row + i);
      ConvertRow(at(call.tensors.sin, p.sin_batch, p.sin_row, row, i * p.sin_pair), call.variant.table_dtype,
                 p.sin_pair, end - i, scratch.sin_row + i);
      i = end;
    }
    const auto sign = hn::BitCast(df, hn::Set(du, call.variant.inverse ? 0x80000000u : 0u));
    put([&](int i, V& c, V& s) ROPEWALK_ATTR {
      c = hn::Load(df, scratch.cos_row + i);
      s = hn::Xor(hn::Load(df, scratch.sin_row + i), sign);
    });
    return;
  }

  if (axes) {
    for (int i = 0; i < pairs; ++i) {
      const auto position = static_cast<uint64_t>(positions[i]);
      scratch.position_low[i] = static_cast<uint32_t>(position);
      scratch.position_high[i] = static_cast<uint32_t>(position >> 32);
    }
  }
  const auto position = static_cast<uint64_t>(plan.position);
  VU low = hn::Set(du, static_cast<uint32_t>(position));
  VU high = hn::Set(du, static_cast<uint32_t>(position >> 32));
  const V scale = hn::Set(df, p.attention_scaling);
  const V sin_scale = hn::Set(df, call.variant.inverse ? -p.attention_scaling : p.attention_scaling);
  put([&](int i, V& c, V& s) ROPEWALK_ATTR {
    if (axes) {
      low = hn::Load(du, scratch.position_low + i);
      high = hn::Load(du, scratch.position_high + i);
    }
    CosSin(Phase(low, high, hn::Load(du, scratch.turns_low + i), hn::Load(du, scratch.turns_high + i)), c, s);
    c = hn::Mul(c, scale);
    s = hn::Mul(s, sin_scale);
    if (call.variant.rounding == kRopeRoundReference) {
      // As a model's rotary module hands them over: in the dtype of the tensors.
      c = RoundTo(call.variant.dtype, c);
      s = RoundTo(call.variant.dtype, s);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights

// The effective weights (1 without, 1 + weight if zero-centred) of each part, in the order of its vectors.
template <class T, bool kInterleaved>
HWY_NOINLINE void FillWeights(const RopeCall& call, const Parts& parts, const void* weight, float* out) {
  const int64_t bytes = call.variant.weight_dtype == kRopeF32 ? 4 : 2;
  const V one = hn::Set(df, 1.0f);
  for (int i = 0; i < 4; ++i) {
    const Run& run = parts.part[i];
    float* table = out + run.table;
    const int size = (run.length + kBlock - 1) / kBlock * kBlock;
    for (int j = 0; j < size; j += kLanes) hn::Store(one, df, table + j);
    if (weight) {
      ConvertRow(static_cast<const char*>(weight) + run.begin * bytes, call.variant.weight_dtype, 1, run.length, table);
    }
    if (call.variant.weight == kRopeZeroCenteredWeight) {
      for (int j = 0; j < size; j += kLanes) hn::Store(hn::Add(hn::Load(df, table + j), one), df, table + j);
    }
    if (!T::kEvenOdd || (i == 1 && parts.form == Form::kNatural)) continue;
    const bool halves = parts.form == Form::kSplit && (i == 1 || i == 2);
    for (int j = 0; j < run.length - (halves ? NaturalTail<T>(run.length) : 0); j += kBlock) {
      const V low = hn::Load(df, table + j), high = hn::Load(df, table + j + kLanes);
      hn::Store(hn::ConcatEven(df, high, low), df, table + j);
      hn::Store(hn::ConcatOdd(df, high, low), df, table + j + kLanes);
    }
  }
}

// What vectors x and y of pairs are rotated with: cosines and sines; with the norm, these times weights.
template <class D>
struct Angles {
  hn::Vec<D> x_cos, y_sin, y_cos, x_sin;
};

// The elements that those of a vector are rotated with.
template <bool kInterleaved, class D>
struct Partners {
  hn::Vec<hn::RebindToSigned<D>> indices;

  explicit HWY_INLINE Partners(const Parts& parts) : indices(hn::Load(hn::RebindToSigned<D>(), parts.partners)) {}
  HWY_INLINE hn::Vec<D> Of(hn::Vec<D> v) const {
    if constexpr (kInterleaved) return hn::Shuffle2301(v);
    return hn::TableLookupLanes(v, hn::IndicesFromVec(D(), indices));
  }
};

// Cosines and sines times the weights of the elements that they multiply, so that the norm costs a head no product but
// 1 / rms: for the i-th vector of pairs x cos, y sin, y cos, x sin.
template <bool kInterleaved>
HWY_INLINE void FoldedFactors(const Parts& parts, const float* cos, const float* sin, const float* weight, int i,
                              V (&factor)[4]) {
  const int first = parts.part[1].table, second = kInterleaved ? first + kLanes : parts.part[2].table;
  constexpr int kWeightStep = kInterleaved ? kBlock : kLanes;
  const V c = hn::Load(df, cos + i * kLanes), s = hn::Load(df, sin + i * kLanes);
  const V x = hn::LoadU(df, weight + first + i * kWeightStep), y = hn::LoadU(df, weight + second + i * kWeightStep);
  factor[0] = hn::Mul(c, x);
  factor[1] = hn::Mul(s, y);
  factor[2] = hn::Mul(c, y);
  factor[3] = hn::Mul(s, x);
}

// Of the whole part; in natural order two for each vector: what multiplies an element, and its partner.
template <bool kInterleaved>
HWY_NOINLINE void FoldWeights(const Parts& parts, const float* cos, const float* sin, const float* weight, float* out) {
  const Run& run = parts.part[1];
  if (parts.form == Form::kNatural) {
    const Partners<kInterleaved, DF> partners(parts);
    for (int i = 0; i < run.length; i += kLanes) {
      const V w = hn::Load(df, weight + run.table + i);
      hn::Store(hn::Mul(hn::Load(df, cos + i), w), df, out + 2 * i);
      hn::Store(hn::Mul(hn::Load(df, sin + i), partners.Of(w)), df, out + 2 * i + kLanes);
    }
    return;
  }
  constexpr int kPairs = kInterleaved ? 1 : 2;  // vectors of pairs in a block
  for (int i = 0; i < (run.length + kBlock - 1) / kBlock * kPairs; ++i) {
    V factor[4];
    FoldedFactors<kInterleaved>(parts, cos, sin, weight, i, factor);
    for (int j = 0; j < 4; ++j) hn::Store(factor[j], df, out + (4 * i + j) * kLanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();

#endif
