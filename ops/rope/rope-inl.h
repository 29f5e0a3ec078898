// The CPU kernel: one body for every stage and dtype, compiled once for each Highway target (backends/cpu/dispatch.cc).
// No include guard: it is read again for each.
//
// A token's sines are computed once, for all its heads. A head is worked on in blocks of two vectors of floats: `a` and
// `b` hold a block's elements in the order that its dtype loads cheapest (bfloat16: the even and the odd ones; else the
// lower and the upper half), and cosines, sines and weights are laid out in that order beforehand. Where the rotated
// part is no whole number of blocks, its last block overlaps the one before: it is computed first and stored last.
// SPDX-License-Identifier: Apache-2.0

HWY_BEFORE_NAMESPACE();
#if HWY_TARGET == HWY_AVX3
// With the CPU's own bfloat16 rounding, which only the kernels of kNative use, and only CPUs that have it run those.
HWY_AFTER_NAMESPACE();
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#undef ROPEWALK_ATTR  // for lambdas, which the attributes pushed do not reach
#define ROPEWALK_ATTR __attribute__((target(HWY_TARGET_STR ",avx512bf16")))
#else
#undef ROPEWALK_ATTR
#define ROPEWALK_ATTR HWY_ATTR
#endif
namespace ropewalk {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using D16 = hn::Repartition<uint16_t, DF>;
using DH16 = hn::Rebind<uint16_t, DF>;
using DU8 = hn::Rebind<uint8_t, DF>;
using V = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr DF df;
constexpr DU du;
constexpr D16 d16;
constexpr DH16 dh16;
constexpr int kLanes = HWY_LANES(float);
constexpr int kBlock = 2 * kLanes;  // elements
constexpr int kMaxHeadDim = 8192;
constexpr int64_t kPrefetchBytes = 8192;  // of a tensor, ahead of the work on it

// ---------------------------------------------------------------------------------------------------------------------
// Conversions. Round to nearest, ties to even.

// A float as a smaller one, in the low bits of each lane: kMantissa bits of it, exponent bias kBias. Beyond the largest
// the code is kTop: infinity, or the largest finite number. Subnormal results come from an addition whose last place is
// theirs.
template <int kMantissa, int kBias, uint32_t kTop, uint32_t kNan, int kSignShift>
HWY_INLINE VU Encode(V v) {
  constexpr int kDrop = 23 - kMantissa;
  const VU bits = hn::BitCast(du, v);
  const VU magnitude = hn::And(bits, hn::Set(du, 0x7fffffffu));
  const VU odd = hn::And(hn::ShiftRight<kDrop>(magnitude), hn::Set(du, 1u));
  const VU rounded = hn::Add(hn::Add(magnitude, hn::Set(du, (1u << (kDrop - 1)) - 1)), odd);
  const VU normal = hn::ShiftRight<kDrop>(hn::Sub(rounded, hn::Set(du, uint32_t{127 - kBias} << 23)));
  const VU magic = hn::Set(du, uint32_t{127 + 1 - kBias + kDrop} << 23);
  const VU subnormal = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, magnitude), hn::BitCast(df, magic))), magic);
  const auto is_subnormal =
      hn::Lt(hn::BitCast(df, magnitude), hn::BitCast(df, hn::Set(du, uint32_t{128 - kBias} << 23)));
  // The clamp comes before the choice: of a subnormal, `normal` wrapped around.
  VU code = hn::Min(hn::IfThenElse(hn::RebindMask(du, is_subnormal), subnormal, normal), hn::Set(du, kTop));
  code = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Set(du, kNan), code);
  return hn::Or(code, hn::ShiftLeft<kSignShift>(hn::ShiftRight<31>(bits)));
}

HWY_INLINE VU EncodeE4M3(V v) { return Encode<3, 7, 0x7e, 0x7f, 7>(v); }
HWY_INLINE VU EncodeE5M2(V v) { return Encode<2, 15, 0x7b, 0x7f, 7>(v); }

// A bfloat16 in the upper half of each lane, the lower half undefined. A NaN keeps its upper bits and becomes quiet.
HWY_INLINE VU RoundBf16Bits(V v) {
  const VU bits = hn::BitCast(du, v);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd);
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Or(bits, hn::Set(du, 0x00400000u)), rounded);
}

HWY_INLINE V DecodeF16(hn::Vec<DH16> half) {
#if HWY_TARGET >= HWY_SSE4 && HWY_ARCH_X86  // no F16C
  const VU bits = hn::PromoteTo(du, half);
  const VU magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffu)));
  V value = hn::Mul(hn::BitCast(df, magnitude), hn::BitCast(df, hn::Set(du, uint32_t{127 + 112} << 23)));
  const auto special = hn::Ge(hn::BitCast(df, magnitude), hn::BitCast(df, hn::Set(du, 0x0f800000u)));
  value = hn::IfThenElse(special, hn::BitCast(df, hn::Or(magnitude, hn::Set(du, 0x7f800000u))), value);
  // A subnormal half is no subnormal float on the way, which a caller's mode (DAZ) may take for zero.
  const VU least = hn::Set(du, uint32_t{113} << 23);  // 2^-14
  const V small = hn::Abs(hn::Sub(hn::BitCast(df, hn::Or(magnitude, least)), hn::BitCast(df, least)));
  value = hn::IfThenElse(hn::RebindMask(df, hn::Lt(magnitude, hn::Set(du, 1u << 23))), small, value);
  return hn::Or(value, hn::BitCast(df, hn::ShiftLeft<31>(hn::ShiftRight<15>(bits))));
#else
  return hn::PromoteTo(df, hn::BitCast(hn::Rebind<hwy::float16_t, DF>(), half));
#endif
}

HWY_INLINE hn::Vec<DH16> EncodeF16(V v) {
#if HWY_TARGET >= HWY_SSE4 && HWY_ARCH_X86
  return hn::TruncateTo(dh16, Encode<10, 15, 0x7c00, 0x7e00, 15>(v));
#else
  return hn::BitCast(dh16, hn::DemoteTo(hn::Rebind<hwy::float16_t, DF>(), v));
#endif
}

struct F32 {
  using Raw = float;
  static constexpr uint8_t kDtype = kRopeF32;
  static constexpr Raw kNan = __builtin_nanf("");
  static HWY_INLINE V Round(V v) { return v; }
};
struct F16 {
  using Raw = uint16_t;
  static constexpr uint8_t kDtype = kRopeF16;
  static constexpr Raw kNan = 0x7e00;
  static HWY_INLINE V Round(V v) { return DecodeF16(EncodeF16(v)); }
};
struct BF16 {
  using Raw = uint16_t;
  static constexpr uint8_t kDtype = kRopeBF16;
  static constexpr Raw kNan = 0x7fc0;
  static HWY_INLINE V Round(V v) { return hn::BitCast(df, hn::And(RoundBf16Bits(v), hn::Set(du, 0xffff0000u))); }
};

// Whether a block is loaded as its even and its odd elements.
template <class T, bool kPairs>
constexpr bool kEvenOdd = kPairs || T::kDtype == kRopeBF16;

// A block of bfloat16.
HWY_INLINE void UnpackBf16(hn::Vec<D16> block, V& a, V& b) {
  const VU words = hn::BitCast(du, block);
  a = hn::BitCast(df, hn::ShiftLeft<16>(words));
  b = hn::BitCast(df, hn::And(words, hn::Set(du, 0xffff0000u)));
}

// Loads a block. kPairs: as its even and odd elements, whatever the dtype.
template <class T, bool kPairs>
HWY_INLINE void LoadBlock(const typename T::Raw* p, V& a, V& b) {
  if constexpr (T::kDtype == kRopeF32) {
    if constexpr (kPairs) {
      hn::LoadInterleaved2(df, p, a, b);
    } else {
      a = hn::LoadU(df, p);
      b = hn::LoadU(df, p + kLanes);
    }
  } else {
    const auto block = hn::LoadU(d16, p);
    const VU words = hn::BitCast(du, block);
    if constexpr (T::kDtype == kRopeBF16) {
      UnpackBf16(block, a, b);
    } else if constexpr (kPairs) {
      a = DecodeF16(hn::TruncateTo(dh16, words));
      b = DecodeF16(hn::TruncateTo(dh16, hn::ShiftRight<16>(words)));
    } else {
      a = DecodeF16(hn::LoadU(dh16, p));
      b = DecodeF16(hn::LoadU(dh16, p + kLanes));
    }
  }
}

// kNative: bfloat16 by the CPU's own instruction, which takes subnormal numbers for zero.
template <class T, bool kPairs, bool kNative>
HWY_INLINE void StoreBlock(typename T::Raw* p, V a, V b) {
  if constexpr (T::kDtype == kRopeF32) {
    if constexpr (kPairs) {
      hn::StoreInterleaved2(a, b, df, p);
    } else {
      hn::StoreU(a, df, p);
      hn::StoreU(b, df, p + kLanes);
    }
  } else if constexpr (T::kDtype == kRopeBF16) {
#if HWY_TARGET == HWY_AVX3
    if constexpr (kNative) {
      alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                               21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                               11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.raw, a.raw));
      _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
      return;
    }
#endif
    const VU odd = hn::And(RoundBf16Bits(b), hn::Set(du, 0xffff0000u));
    hn::StoreU(hn::BitCast(d16, hn::Or(hn::ShiftRight<16>(RoundBf16Bits(a)), odd)), d16, p);
  } else if constexpr (kPairs) {
    const VU odd = hn::ShiftLeft<16>(hn::PromoteTo(du, EncodeF16(b)));
    hn::StoreU(hn::BitCast(d16, hn::Or(hn::PromoteTo(du, EncodeF16(a)), odd)), d16, p);
  } else {
    hn::StoreU(EncodeF16(a), dh16, p);
    hn::StoreU(EncodeF16(b), dh16, p + kLanes);
  }
}

// Stores a block as fp8. kSplit: a and b are its even and odd elements.
template <bool kSplit>
HWY_INLINE void StoreFp8Block(uint8_t* p, V a, V b, bool e4m3) {
  const VU low = e4m3 ? EncodeE4M3(a) : EncodeE5M2(a);
  const VU high = e4m3 ? EncodeE4M3(b) : EncodeE5M2(b);
  if constexpr (kSplit) {
    const auto pairs = hn::TruncateTo(dh16, hn::Or(low, hn::ShiftLeft<8>(high)));
    alignas(64) uint16_t buffer[kLanes];
    hn::Store(pairs, dh16, buffer);
    std::memcpy(p, buffer, kBlock);
  } else {
    hn::StoreU(hn::TruncateTo(DU8(), low), DU8(), p);
    hn::StoreU(hn::TruncateTo(DU8(), high), DU8(), p + kLanes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tables in block order

// A run of a head's elements that is treated alike, cut into blocks. Of at least one block; PaddedHead sees to that.
struct Run {
  int begin = 0, length = 0;
  int blocks = 0;     // whole ones
  bool tail = false;  // a last one that overlaps the block before
  int table = 0;      // where its weights begin

  Run() = default;
  Run(int begin_, int length_, int table_) : begin(begin_), length(length_), table(table_) {
    blocks = length / kBlock;
    tail = length % kBlock != 0;
  }
  int tail_begin() const { return length - kBlock; }
  int table_size() const { return (blocks + tail) * kBlock; }
};

// Lays values in natural order out in blocks of `kBlock` values (kWhole), or of kLanes (one value for each pair of
// neighbours). `values` has room for two more blocks behind `count`; reads past `count` see zeros.
template <bool kWhole, bool kReorder, class Value>
HWY_INLINE void Arrange(Value* values, int count) {
  static constexpr hn::ScalableTag<Value> kTag;
  constexpr int kStep = kWhole ? kBlock : kLanes;
  const int blocks = count / kStep;
  const auto reorder = [](Value* block) ROPEWALK_ATTR {
    if constexpr (kReorder) {
      const auto low = hn::LoadU(kTag, block), high = hn::LoadU(kTag, block + kLanes);
      hn::StoreU(hn::ConcatEven(kTag, high, low), kTag, block);
      hn::StoreU(hn::ConcatOdd(kTag, high, low), kTag, block + kLanes);
    }
  };
  if (count % kStep) {
    Value last[kBlock] = {};
    const int width = blocks ? kStep : count;
    std::memcpy(last, values + count - width, static_cast<size_t>(width) * sizeof(Value));
    std::memcpy(values + blocks * kStep, last, kStep * sizeof(Value));
    reorder(values + blocks * kStep);
  }
  for (int i = 0; i < blocks; ++i) reorder(values + i * kStep);
}

// Values that Arrange leaves.
template <bool kWhole>
HWY_INLINE int ArrangedSize(int count) {
  constexpr int kStep = kWhole ? kBlock : kLanes;
  return (count + kStep - 1) / kStep * kStep;
}

// `count` elements of a tensor as floats, in natural order; writes whole blocks.
HWY_INLINE void ConvertRow(const void* data, uint8_t dtype, int64_t stride, int count, float* out) {
  const auto convert = [&](auto tag) ROPEWALK_ATTR {
    using T = decltype(tag);
    const auto* p = static_cast<const typename T::Raw*>(data);
    for (int i = 0; i < count; i += kBlock) {
      typename T::Raw padded[kBlock];
      const typename T::Raw* block = p + i;
      if (stride != 1 || i + kBlock > count) {
        for (int j = 0; j < kBlock; ++j) padded[j] = i + j < count ? p[(i + j) * stride] : typename T::Raw{0};
        block = padded;
      }
      V a, b;
      LoadBlock<T, false>(block, a, b);
      if constexpr (kEvenOdd<T, false>) {
        hn::StoreInterleaved2(a, b, df, out + i);
      } else {
        hn::StoreU(a, df, out + i);
        hn::StoreU(b, df, out + i + kLanes);
      }
    }
  };
  switch (dtype) {
    case kRopeF32: return convert(F32());
    case kRopeF16: return convert(F16());
    default: return convert(BF16());
  }
}

// cos and sin of a phase: a turn is 2^32. Reduced to an eighth of a turn on either side, then polynomials whose
// coefficients were fitted to the sine and cosine there (largest errors 2^-28.7 and 2^-30.8 before rounding).
HWY_INLINE void CosSin(VU phase, V& cosine, V& sine) {
  const VU quadrant = hn::ShiftRight<30>(hn::Add(phase, hn::Set(du, 1u << 29)));
  const auto rest = hn::BitCast(hn::RebindToSigned<DF>(), hn::Sub(phase, hn::ShiftLeft<30>(quadrant)));
  const V x = hn::Mul(hn::ConvertTo(df, rest), hn::Set(df, 1.46291807926715968e-9f));  // 2 pi / 2^32
  const V x2 = hn::Mul(x, x);
  V s = hn::MulAdd(hn::Set(df, kSin7), x2, hn::Set(df, kSin5));
  s = hn::MulAdd(s, x2, hn::Set(df, kSin3));
  s = hn::MulAdd(hn::Mul(s, x2), x, x);
  V c = hn::MulAdd(hn::Set(df, kCos8), x2, hn::Set(df, kCos6));
  c = hn::MulAdd(c, x2, hn::Set(df, kCos4));
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

// One configuration of the kernel.
template <class T_, bool kInterleaved_, bool kNorm_, bool kReference_>
struct Config {
  using T = T_;
  using Raw = typename T::Raw;
  static constexpr bool kInterleaved = kInterleaved_;
  static constexpr bool kNorm = kNorm_;
  static constexpr bool kReference = kReference_;
};

HWY_INLINE V RoundTo(uint8_t dtype, V v) {
  return dtype == kRopeF32 ? v : dtype == kRopeF16 ? F16::Round(v) : BF16::Round(v);
}

// A head's parts: before the rotated one, the rotated one (neox: its halves), behind it. In a padded layout a part of
// less than a block takes up a whole one, so that kernels need not know of partial blocks.
struct Layout {
  Run part[4];
  bool needs_padding = false;
  int padded_size = 0;

  Layout() = default;
  Layout(const int (&lengths)[4]) {
    int begin = 0, table = 0;
    for (int i = 0; i < 4; ++i) {
      part[i] = Run(begin, lengths[i], table);
      begin += lengths[i];
      needs_padding |= lengths[i] > 0 && lengths[i] < kBlock;
      table += part[i].table_size();
    }
    padded_size = begin;
  }
};

inline Layout MakeLayout(const rope_params& p, bool interleaved) {
  const int half = p.rotary_dim / 2;
  return Layout({p.rotary_offset, interleaved ? p.rotary_dim : half, interleaved ? 0 : half,
                 p.head_dim - p.rotary_offset - p.rotary_dim});
}

inline Layout PaddedLayout(const Layout& layout) {
  int lengths[4];
  for (int i = 0; i < 4; ++i) {
    const int length = layout.part[i].length;
    lengths[i] = length > 0 && length < kBlock ? kBlock : length;
  }
  return Layout(lengths);
}

// Heads whose 1 / rms is made before the first of them is rotated, so that no rotation waits for a sum, a square root
// and a division: at most so many, and as many bytes as stay in L1 twice.
constexpr int64_t kNormedAtOnce = 128;
constexpr int64_t kNormedBytes = 12288;

// What a thread keeps beside the tensors. Large enough for every head_dim; only what is used is touched.
struct Scratch {
  int64_t positions[kMaxHeadDim / 2];                  // see PlanRow
  alignas(64) float padded[kMaxHeadDim + 4 * kBlock];  // a head, and its place in a cache: see PaddedHead
  alignas(64) float padded_cache[kMaxHeadDim + 4 * kBlock];
  alignas(64) float cos[kMaxHeadDim / 2 + 2 * kBlock];
  alignas(64) float sin[kMaxHeadDim / 2 + 2 * kBlock];
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

// The halves of the frequencies' turns, in block order.
template <bool kInterleaved, bool kEvenOddHalves>
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
  for (; i < pairs; ++i) {
    scratch.turns_low[i] = static_cast<uint32_t>(turns[i]);
    scratch.turns_high[i] = static_cast<uint32_t>(turns[i] >> 32);
  }
  Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(scratch.turns_low, pairs);
  Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(scratch.turns_high, pairs);
}

// Cosines and sines of a token, in block order. kEvenOddHalves: halves are loaded as even and odd elements.
template <bool kInterleaved, bool kEvenOddHalves>
HWY_NOINLINE void FillCosSin(const RopeCall& call, const RowPlan& plan, Scratch& scratch) {
  const rope_params& p = call.params;
  const int pairs = p.rotary_dim / 2;
  const bool axes = call.variant.axes != 0;
  const int64_t* positions = scratch.positions;
  float* cos = scratch.cos;
  float* sin = scratch.sin;

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
      // ConvertRow writes whole blocks: what it writes too much the next run overwrites.
      ConvertRow(at(call.tensors.cos, p.cos_batch, p.cos_row, row, i * p.cos_pair), call.variant.table_dtype,
                 p.cos_pair, end - i, cos + i);
      ConvertRow(at(call.tensors.sin, p.sin_batch, p.sin_row, row, i * p.sin_pair), call.variant.table_dtype,
                 p.sin_pair, end - i, sin + i);
      i = end;
    }
    if (call.variant.inverse) {
      for (int i = 0; i < pairs; i += kLanes) hn::Store(hn::Neg(hn::Load(df, sin + i)), df, sin + i);
    }
    Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(cos, pairs);
    Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(sin, pairs);
  } else {
    if (axes) {
      for (int i = 0; i < pairs; ++i) {
        const auto position = static_cast<uint64_t>(positions[i]);
        scratch.position_low[i] = static_cast<uint32_t>(position);
        scratch.position_high[i] = static_cast<uint32_t>(position >> 32);
      }
      Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(scratch.position_low, pairs);
      Arrange<!kInterleaved, !kInterleaved && kEvenOddHalves>(scratch.position_high, pairs);
    }
    const auto position = static_cast<uint64_t>(plan.position);
    VU low = hn::Set(du, static_cast<uint32_t>(position));
    VU high = hn::Set(du, static_cast<uint32_t>(position >> 32));
    const V scale = hn::Set(df, p.attention_scaling);
    const V sin_scale = hn::Set(df, call.variant.inverse ? -p.attention_scaling : p.attention_scaling);
    const int size = ArrangedSize<!kInterleaved>(pairs);
    for (int i = 0; i < size; i += kLanes) {
      const VU turns_low = hn::Load(du, scratch.turns_low + i), turns_high = hn::Load(du, scratch.turns_high + i);
      if (axes) {
        low = hn::Load(du, scratch.position_low + i);
        high = hn::Load(du, scratch.position_high + i);
      }
      V c, s;
      CosSin(Phase(low, high, turns_low, turns_high), c, s);
      c = hn::Mul(c, scale);
      s = hn::Mul(s, sin_scale);
      if (call.variant.rounding == kRopeRoundReference) {
        // As a model's rotary module hands them over: in the dtype of the tensors.
        c = RoundTo(call.variant.dtype, c);
        s = RoundTo(call.variant.dtype, s);
      }
      hn::Store(c, df, cos + i);
      hn::Store(s, df, sin + i);
    }
  }
}

// The effective weights (1 without, 1 + weight if zero-centred) of each part, in block order.
template <bool kInterleaved, bool kEvenOddHalves>
HWY_NOINLINE void FillWeights(const RopeCall& call, const Layout& layout, const void* weight, float* out) {
  const int64_t bytes = call.variant.weight_dtype == kRopeF32 ? 4 : 2;
  for (int i = 0; i < 4; ++i) {
    // A padded part is a block of its own, so that what is written is what table_size says.
    const Run& run = layout.part[i];
    float* table = out + run.table;
    if (run.length == 0) continue;
    if (weight) {
      ConvertRow(static_cast<const char*>(weight) + run.begin * bytes, call.variant.weight_dtype, 1, run.length, table);
    }
    const V one = hn::Set(df, 1.0f);
    for (int j = 0; j < run.length; j += kLanes) {
      V value = one;
      if (weight) value = hn::LoadU(df, table + j);
      if (call.variant.weight == kRopeZeroCenteredWeight) value = hn::Add(value, one);
      hn::StoreU(value, df, table + j);
    }
    if (i == 1 && kInterleaved) {
      Arrange<true, true>(table, run.length);
    } else {
      Arrange<true, kEvenOddHalves>(table, run.length);
    }
  }
}

// Cosines and sines times the weights of the elements that they multiply, so that the norm costs a head no product but
// 1 / rms: for the i-th vector of pairs x cos, y sin, y cos, x sin.
template <bool kInterleaved>
HWY_INLINE void FoldedFactors(const Layout& layout, const float* cos, const float* sin, const float* weight, int i,
                              V (&factor)[4]) {
  const int first = layout.part[1].table, second = kInterleaved ? first + kLanes : layout.part[2].table;
  constexpr int kWeightStep = kInterleaved ? kBlock : kLanes;
  const V c = hn::Load(df, cos + i * kLanes), s = hn::Load(df, sin + i * kLanes);
  const V x = hn::LoadU(df, weight + first + i * kWeightStep), y = hn::LoadU(df, weight + second + i * kWeightStep);
  factor[0] = hn::Mul(c, x);
  factor[1] = hn::Mul(s, y);
  factor[2] = hn::Mul(c, y);
  factor[3] = hn::Mul(s, x);
}

template <bool kInterleaved>
HWY_NOINLINE void FoldWeights(const Layout& layout, const float* cos, const float* sin, const float* weight,
                              float* out) {
  const Run& run = layout.part[1];
  const int blocks = run.blocks + run.tail;
  const int vectors = kInterleaved ? blocks : 2 * blocks;
  for (int i = 0; i < vectors; ++i) {
    V factor[4];
    FoldedFactors<kInterleaved>(layout, cos, sin, weight, i, factor);
    for (int j = 0; j < 4; ++j) hn::Store(factor[j], df, out + (4 * i + j) * kLanes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Heads

// The squares of a head; what is left to add up is the lanes.
template <class T, bool kNative>
HWY_INLINE V SquaresOf(const typename T::Raw* head, int count) {
  V sum0 = hn::Zero(df), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  V a, b;
  int i = 0;
#if HWY_TARGET == HWY_AVX3
  if constexpr (kNative) {  // takes subnormal numbers for zero, whose squares are that anyway
    for (; i + 2 * kBlock <= count; i += 2 * kBlock) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_loadu_si512(head + i));
      const auto y = reinterpret_cast<__m512bh>(_mm512_loadu_si512(head + i + kBlock));
      sum0.raw = _mm512_dpbf16_ps(sum0.raw, x, x);
      sum1.raw = _mm512_dpbf16_ps(sum1.raw, y, y);
    }
    if (i == count) return hn::Add(sum0, sum1);
  }
#endif
  for (; i + 2 * kBlock <= count; i += 2 * kBlock) {
    LoadBlock<T, false>(head + i, a, b);
    sum0 = hn::MulAdd(a, a, sum0);
    sum1 = hn::MulAdd(b, b, sum1);
    LoadBlock<T, false>(head + i + kBlock, a, b);
    sum2 = hn::MulAdd(a, a, sum2);
    sum3 = hn::MulAdd(b, b, sum3);
  }
  for (; i < count; i += kBlock) {
    typename T::Raw padded[kBlock] = {};
    const typename T::Raw* block = head + i;
    if (i + kBlock > count) {
      std::memcpy(padded, block, static_cast<size_t>(count - i) * sizeof(padded[0]));
      block = padded;
    }
    LoadBlock<T, false>(block, a, b);
    sum0 = hn::MulAdd(a, a, sum0);
    sum1 = hn::MulAdd(b, b, sum1);
  }
  return hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
}

// The sums of kLanes / kRows lanes that lie together, of each of kRows vectors.
template <int kRows>
HWY_INLINE V SumsOfLanesOf(const float* rows) {
  if constexpr (kRows == 1) {
    return hn::Load(df, rows);
  } else {
    const V a = SumsOfLanesOf<kRows / 2>(rows), b = SumsOfLanesOf<kRows / 2>(rows + kRows / 2 * kLanes);
    return hn::Add(hn::ConcatEven(df, b, a), hn::ConcatOdd(df, b, a));
  }
}

// The sum of the lanes of each of kLanes vectors; that of one, in the same order and in every lane.
HWY_INLINE V SumsOfLanes(const float* rows) { return SumsOfLanesOf<kLanes>(rows); }
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

// Whether the CPU's own bfloat16 rounding, which takes subnormal numbers for zero, could be wrong by more than 2^-20 of
// a pair. Not if every element's magnitude is in [2^-63, 2^65): adding 64 to the exponent then leaves its highest bit
// set, which costs an addition and an AND a block. Others, zero among them, take the integer rounding.
HWY_INLINE hn::Vec<D16> ExponentShifted(hn::Vec<D16> block) { return hn::Add(block, hn::Set(d16, uint16_t{64u << 7})); }
HWY_INLINE bool AllOrdinary(hn::Vec<D16> shifted) {
  const auto highest = hn::Set(d16, uint16_t{0x4000});
  return hn::AllTrue(d16, hn::TestBit(shifted, highest));
}
HWY_INLINE bool HasTiny(const uint16_t* head, int count) {
  auto all = hn::Set(d16, uint16_t{0xffff});
  int i = 0;
  for (; i + kBlock <= count; i += kBlock) all = hn::And(all, ExponentShifted(hn::LoadU(d16, head + i)));
  if (i < count) {
    uint16_t padded[kBlock];
    std::fill_n(padded, kBlock, uint16_t{0x3f80});
    std::memcpy(padded, head + i, static_cast<size_t>(count - i) * sizeof(uint16_t));
    all = hn::And(all, ExponentShifted(hn::LoadU(d16, padded)));
  }
  return !AllOrdinary(all);
}

// The same of pairs, a head in blocks. In halves the larger element of a pair counts, which halves the work: its weight
// must not take it away again, see OrdinaryWeights.
template <bool kInterleaved, int kFixed, int kVectors>
HWY_INLINE bool HasTinyPair(const hn::Vec<D16> (&blocks)[kVectors]) {
  if constexpr (kInterleaved) {
    auto all = hn::Set(d16, uint16_t{0xffff});
    HWY_UNROLL(32)
    for (int i = 0; i < kVectors; ++i) all = hn::And(all, ExponentShifted(blocks[i]));
    return !AllOrdinary(all);
  } else {
    const auto highest_two = hn::Set(d16, uint16_t{0x6000});
    auto least = highest_two;
    HWY_UNROLL(32)
    for (int i = 0; i < kFixed; ++i) {
      least = hn::Min(least, hn::And(hn::Or(blocks[i], blocks[kFixed + i]), highest_two));
    }
    return !hn::AllTrue(d16, hn::Ne(least, hn::Zero(d16)));
  }
}

// Whether weights leave an element's magnitude about what it was.
HWY_INLINE bool OrdinaryWeights(const Layout& layout, const float* weight) {
  const V least = hn::Set(df, 0x1p-20f), most = hn::Set(df, 0x1p20f);
  auto ordinary = hn::FirstN(df, kLanes);
  for (const Run* run : {&layout.part[1], &layout.part[2]}) {
    for (int i = 0; i < run->table_size(); i += kLanes) {
      const V magnitude = hn::Abs(hn::LoadU(df, weight + run->table + i));
      ordinary = hn::And(ordinary, hn::And(hn::Gt(magnitude, least), hn::Lt(magnitude, most)));
    }
  }
  return hn::AllTrue(df, ordinary);
}

enum Store { kNoStore, kStoreSame, kStoreFp8 };

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
  const Layout* layout;
  const Layout* padded;
  Scratch* scratch;
  const float* cos;
  const float* sin;
  const float* weight;
  float* folded;    // room for FoldWeights
  float* rstd;      // 1 / rms of the heads that are next
  float* squares;   // what SquaresOf gives for the heads at `next`, filled while these are rotated
  const Raw* next;  // the heads of the next token; null: nothing is filled
  float eps, scale_value;
  bool e4m3;
  bool zero_centered;
  bool ordinary_weights;  // see OrdinaryWeights
  bool round_products;    // reference rounding, in the dtype of the tensors rather than in float32
};

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

// Vectors that a kernel of kFixed blocks keeps in registers: of a head, and of the table it is rotated with.
template <class C, int kFixed>
constexpr int kHeadVectors = kFixed == 0       ? 1
                             : C::kInterleaved ? kFixed
                                               : 2 * kFixed;
template <class C, int kFixed>
constexpr int kTableVectors = kFixed == 0 ? 1 : (C::kInterleaved ? 1 : 2) * kFixed*(C::kNorm ? 4 : 2);

// One head. C: the configuration; kStore: whether and how it also goes to a cache; kFixed: 0, or the number of blocks
// of the rotated part (neox: of a half) where that is the whole head, whose blocks then were loaded once, into
// `blocks`, and whose table all heads find in registers.
template <class C, int kStore, bool kNative, int kFixed>
struct Head {
  using T = typename C::T;
  using Raw = typename C::Raw;
  const Heads<T>& heads;
  const Layout& layout;
  const Raw* in;
  Raw* out;
  void* cache;
  V rstd;
  V inverse_scale;
  const hn::Vec<D16> (&blocks)[kHeadVectors<C, kFixed>];
  const V (&table)[kTableVectors<C, kFixed>];

  HWY_INLINE V Normalise(V v, V weight) const {
    const V unit = hn::Mul(v, rstd);
    if constexpr (!C::kReference) return hn::Mul(unit, weight);
    // The Hugging Face chains: Llama rounds, then multiplies by the weight; Gemma multiplies, then rounds.
    return T::Round(hn::Mul(heads.zero_centered ? unit : T::Round(unit), weight));
  }

  // Block `i` of a run, from element `at` of it. kFolded: its weights are in the table that it is rotated with.
  template <bool kPairs, bool kFolded>
  HWY_INLINE void Load(const Run& run, int i, int at, V& a, V& b) const {
    LoadBlock<T, kPairs>(in + run.begin + at, a, b);
    if constexpr (C::kNorm && !kFolded) {
      const float* weight = heads.weight + run.table + i * kBlock;
      a = Normalise(a, hn::LoadU(df, weight));
      b = Normalise(b, hn::LoadU(df, weight + kLanes));
    }
  }

  template <bool kPairs>
  HWY_INLINE void Write(const Run& run, int at, V a, V b) const {
    WriteAt<kPairs>(run.begin + at, a, b);
  }

  // `at` from here on counts from the head's first element.
  template <bool kPairs>
  HWY_INLINE void WriteAt(int at, V a, V b) const {
    if (kStore != kStoreFp8 || out) StoreBlock<T, kPairs, kNative>(out + at, a, b);
    WriteCache<kPairs>(at, a, b);
  }

  template <bool kPairs>
  HWY_INLINE void WriteCache(int at, V a, V b) const {
    if constexpr (kStore == kStoreSame) {
      StoreBlock<T, kPairs, kNative>(static_cast<Raw*>(cache) + at, a, b);
    } else if constexpr (kStore == kStoreFp8) {
      if constexpr (C::kReference) {
        a = T::Round(a);
        b = T::Round(b);
      }
      StoreFp8Block<kEvenOdd<T, kPairs>>(static_cast<uint8_t*>(cache) + at, hn::Mul(a, inverse_scale),
                                         hn::Mul(b, inverse_scale), heads.e4m3);
    }
  }

  static constexpr bool kFolded = C::kNorm && !C::kReference;

  // (x, y) -> (x cos - y sin, y cos + x sin), for the i-th vector of pairs.
  HWY_INLINE void Rotate(V& x, V& y, int i) const {
    if constexpr (kFolded) {
      const auto factor = [&](int j) ROPEWALK_ATTR { return hn::Load(df, heads.folded + (4 * i + j) * kLanes); };
      // Scaled first: products of subnormal numbers would lose what the scale brings back.
      const V unit = hn::Mul(x, rstd);
      y = hn::Mul(y, rstd);
      x = hn::NegMulAdd(y, factor(1), hn::Mul(unit, factor(0)));
      y = hn::MulAdd(unit, factor(3), hn::Mul(y, factor(2)));
      return;
    }
    const V c = hn::Load(df, heads.cos + i * kLanes), s = hn::Load(df, heads.sin + i * kLanes);
    if constexpr (C::kReference) {
      V xc = hn::Mul(x, c), ys = hn::Mul(y, s), yc = hn::Mul(y, c), xs = hn::Mul(x, s);
      if (heads.round_products) {
        xc = T::Round(xc);
        ys = T::Round(ys);
        yc = T::Round(yc);
        xs = T::Round(xs);
      }
      x = hn::Sub(xc, ys);
      y = hn::Add(yc, xs);
    } else {
      const V old = x;
      x = hn::NegMulAdd(y, s, hn::Mul(x, c));
      y = hn::MulAdd(old, s, hn::Mul(y, c));
    }
  }

  // The same of two vectors of pairs, the i-th and the next, with the table in registers, and in the order in which
  // results are there when wanted: a core looks ahead only so far.
  HWY_INLINE void RotateTwo(V& xa, V& ya, V& xb, V& yb, int i) const {
    static_assert(kFixed > 0 && !C::kReference);
    constexpr int kStep = kFolded ? 4 : 2;
    const V* a = table + kStep * i;
    const V* b = a + kStep;
    constexpr int kYCos = kFolded ? 2 : 0, kXSin = kFolded ? 3 : 1;
    if constexpr (kFolded) {
      xa = hn::Mul(xa, rstd);
      ya = hn::Mul(ya, rstd);
      xb = hn::Mul(xb, rstd);
      yb = hn::Mul(yb, rstd);
    }
    const V xca = hn::Mul(xa, a[0]), yca = hn::Mul(ya, a[kYCos]);
    const V xcb = hn::Mul(xb, b[0]), ycb = hn::Mul(yb, b[kYCos]);
    const V new_xa = hn::NegMulAdd(ya, a[1], xca), new_ya = hn::MulAdd(xa, a[kXSin], yca);
    const V new_xb = hn::NegMulAdd(yb, b[1], xcb), new_yb = hn::MulAdd(xb, b[kXSin], ycb);
    xa = new_xa;
    ya = new_ya;
    xb = new_xb;
    yb = new_yb;
  }

  // Neighbours: one part; a block holds kLanes pairs.
  HWY_INLINE void RotateInterleaved() const {
    const Run& run = layout.part[1];
    if constexpr (kFixed > 0) {
      HWY_UNROLL(32)
      for (int i = 0; i < kFixed; i += 2) {
        V xa, ya, xb, yb;
        UnpackBf16(blocks[i], xa, ya);
        UnpackBf16(blocks[i + 1], xb, yb);
        RotateTwo(xa, ya, xb, yb, i);
        WriteAt<true>(i * kBlock, xa, ya);
        WriteAt<true>((i + 1) * kBlock, xb, yb);
      }
      return;
    }
    V last_x = hn::Zero(df), last_y = last_x;
    for (int i = run.tail ? -1 : 0; i < run.blocks; ++i) {
      const int block = i < 0 ? run.blocks : i;
      const int at = i < 0 ? run.tail_begin() : i * kBlock;
      V x, y;
      Load<true, kFolded>(run, block, at, x, y);
      Rotate(x, y, block);
      if (i < 0) {
        last_x = x;
        last_y = y;
      } else {
        Write<true>(run, at, x, y);
      }
    }
    if (run.tail) Write<true>(run, run.tail_begin(), last_x, last_y);
  }

  // Halves: two parts; two blocks hold kBlock pairs.
  HWY_INLINE void RotateHalves() const {
    const Run& run = layout.part[1];
    const Run& other = layout.part[2];
    if constexpr (kFixed > 0) {
      HWY_UNROLL(32)
      for (int i = 0; i < kFixed; ++i) {
        V xa, xb, ya, yb;
        UnpackBf16(blocks[i], xa, xb);
        UnpackBf16(blocks[kFixed + i], ya, yb);
        RotateTwo(xa, ya, xb, yb, 2 * i);
        WriteAt<false>(i * kBlock, xa, xb);
        WriteAt<false>((kFixed + i) * kBlock, ya, yb);
      }
      return;
    }
    V last_xa = hn::Zero(df), last_xb = last_xa, last_ya = last_xa, last_yb = last_xa;
    for (int i = run.tail ? -1 : 0; i < run.blocks; ++i) {
      const int block = i < 0 ? run.blocks : i;
      const int at = i < 0 ? run.tail_begin() : i * kBlock;
      V xa, xb, ya, yb;
      Load<false, kFolded>(run, block, at, xa, xb);
      Load<false, kFolded>(other, block, at, ya, yb);
      Rotate(xa, ya, 2 * block);
      Rotate(xb, yb, 2 * block + 1);
      if (i < 0) {
        last_xa = xa;
        last_xb = xb;
        last_ya = ya;
        last_yb = yb;
      } else {
        Write<false>(run, at, xa, xb);
        Write<false>(other, at, ya, yb);
      }
    }
    if (run.tail) {
      Write<false>(run, run.tail_begin(), last_xa, last_xb);
      Write<false>(other, run.tail_begin(), last_ya, last_yb);
    }
  }

  // Outside the rotated part: normalised if there is a norm, else the same bits.
  HWY_NOINLINE void Rest(const Run& run) const {
    if constexpr (!C::kNorm) {
      const auto bytes = static_cast<size_t>(run.length) * sizeof(Raw);
      if (out && out != in) std::memcpy(out + run.begin, in + run.begin, bytes);
      if constexpr (kStore == kStoreSame) std::memcpy(static_cast<Raw*>(cache) + run.begin, in + run.begin, bytes);
      if constexpr (kStore != kStoreFp8) return;
    }
    V last_a = hn::Zero(df), last_b = last_a;
    const auto write = [&](int at, V a, V b) ROPEWALK_ATTR {
      if constexpr (C::kNorm) {
        Write<false>(run, at, a, b);
      } else {
        WriteCache<false>(run.begin + at, a, b);
      }
    };
    for (int i = run.tail ? -1 : 0; i < run.blocks; ++i) {
      V a, b;
      Load<false, false>(run, i < 0 ? run.blocks : i, i < 0 ? run.tail_begin() : i * kBlock, a, b);
      if (i < 0) {
        last_a = a;
        last_b = b;
      } else {
        write(i * kBlock, a, b);
      }
    }
    if (run.tail) write(run.tail_begin(), last_a, last_b);
  }

  HWY_INLINE void All() const {
    if (kFixed == 0 && layout.part[0].length) Rest(layout.part[0]);
    if constexpr (C::kInterleaved) {
      RotateInterleaved();
    } else {
      RotateHalves();
    }
    if (kFixed == 0 && layout.part[3].length) Rest(layout.part[3]);
  }
};

// A head some part of which is shorter than a block: worked on in a copy whose parts are whole blocks.
template <class C, int kStore>
HWY_NOINLINE void PaddedHead(const Heads<typename C::T>& heads, const typename C::Raw* in, typename C::Raw* out,
                             void* cache, V rstd, V inverse_scale) {
  using Raw = typename C::Raw;
  Raw* padded = reinterpret_cast<Raw*>(heads.scratch->padded);
  Raw* padded_cache = reinterpret_cast<Raw*>(heads.scratch->padded_cache);
  const Layout& layout = *heads.layout;
  std::memset(padded, 0, static_cast<size_t>(heads.padded->padded_size) * sizeof(Raw));
  for (int i = 0; i < 4; ++i) {
    std::memcpy(padded + heads.padded->part[i].begin, in + layout.part[i].begin,
                static_cast<size_t>(layout.part[i].length) * sizeof(Raw));
  }
  const hn::Vec<D16> no_blocks[1] = {hn::Zero(d16)};
  const V no_table[1] = {hn::Zero(df)};
  Head<C, kStore, false, 0>{heads, *heads.padded, padded,    padded,  padded_cache,
                            rstd,  inverse_scale, no_blocks, no_table}
      .All();
  const size_t cache_bytes = kStore == kStoreFp8 ? 1 : sizeof(Raw);
  for (int i = 0; i < 4; ++i) {
    const auto from = static_cast<size_t>(heads.padded->part[i].begin), to = static_cast<size_t>(layout.part[i].begin);
    const auto length = static_cast<size_t>(layout.part[i].length);
    if (out) std::memcpy(out + to, padded + from, length * sizeof(Raw));
    if constexpr (kStore != kNoStore) {
      std::memcpy(static_cast<char*>(cache) + to * cache_bytes,
                  reinterpret_cast<const char*>(padded_cache) + from * cache_bytes, length * cache_bytes);
    }
  }
}

template <class C, int kStore, bool kNative, int kFixed>
HWY_NOINLINE void DoHeads(const Heads<typename C::T>& all) {
  using T = typename C::T;
  using Raw = typename C::Raw;
  constexpr int64_t kCacheBytes = kStore == kStoreFp8 ? 1 : sizeof(Raw);
  constexpr int kFactors = C::kNorm ? 4 : 2;
  // A copy that no store can alias; a kernel of fixed size copies only what its loop asks for.
  const std::conditional_t<(kFixed > 0), const Heads<T>&, const Heads<T>> heads = all;
  const Raw* const first_in = heads.in;
  Raw* const first_out = heads.out;
  const Raw* const first_next = heads.next;
  const int64_t in_head = heads.in_head, out_head = heads.out_head, prefetch = heads.prefetch, count = heads.count;
  float* const squares = heads.squares;
  const float* const rstds = heads.rstd;
  V table[kTableVectors<C, kFixed>];
  table[0] = hn::Zero(df);
  if constexpr (kFixed > 0) {
    HWY_UNROLL(32)
    for (int i = 0; i < kTableVectors<C, kFixed> / kFactors; ++i) {
      if constexpr (C::kNorm) {
        V factor[4];
        FoldedFactors<C::kInterleaved>(*heads.layout, heads.cos, heads.sin, heads.weight, i, factor);
        for (int j = 0; j < 4; ++j) table[4 * i + j] = factor[j];
      } else {
        table[2 * i] = hn::Load(df, heads.cos + i * kLanes);
        table[2 * i + 1] = hn::Load(df, heads.sin + i * kLanes);
      }
    }
  }
  int64_t normed = 0;  // the head that rstds begins with
  for (int64_t h = 0; h < count; ++h) {
    const Raw* in = first_in + h * in_head;
    Raw* out = first_out + h * out_head;
    if constexpr (C::kNorm) {
      if (h - normed == heads.at_once) {
        normed = h;
        Rstds<C, kNative>(heads, in, std::min(heads.at_once, count - h));
      }
    }
    // The same head of a later token, into L2: what the hardware's prefetchers bring comes too late where the work on a
    // head takes as long as its way from memory. Rope in DRAM: 0.92 of the floor; into L1, 8 heads ahead: 0.80.
    const int head_dim = kFixed > 0 ? kHeadVectors<C, kFixed> * kBlock : heads.head_dim;
    HWY_UNROLL(32)
    for (int at = 0; at < head_dim; at += 64 / static_cast<int>(sizeof(Raw))) {
      __builtin_prefetch(in + prefetch + at, 0, 2);
    }
    if constexpr (C::kNorm && !C::kReference) {
      if (first_next) {
        hn::Store(SquaresOf<T, kNative>(first_next + h * in_head, head_dim), df, squares + h * kLanes);
      }
    }
    void* cache = nullptr;
    V rstd = hn::Zero(df), inverse_scale = rstd;
    if constexpr (kStore != kNoStore) cache = static_cast<char*>(heads.cache) + h * heads.cache_head * kCacheBytes;
    if constexpr (kStore == kStoreFp8) {
      inverse_scale = hn::Set(df, 1.0f / (heads.scale ? heads.scale[h * heads.scale_head] : heads.scale_value));
    }
    hn::Vec<D16> blocks[kHeadVectors<C, kFixed>];
    blocks[0] = hn::Zero(d16);
    bool tiny = false;
    if constexpr (kFixed > 0) {
      HWY_UNROLL(32)
      for (int i = 0; i < kHeadVectors<C, kFixed>; ++i) blocks[i] = hn::LoadU(d16, in + i * kBlock);
      tiny = HasTinyPair<C::kInterleaved, kFixed>(blocks);
    } else if constexpr (kNative) {
      tiny = HasTiny(in, heads.head_dim);
    }
    if constexpr (C::kNorm) rstd = hn::Set(df, rstds[h - normed]);
    if (kFixed == 0 && HWY_UNLIKELY(heads.layout->needs_padding)) {
      PaddedHead<C, kStore>(heads, in, out, cache, rstd, inverse_scale);
      continue;
    }
    if constexpr (kNative) {
      if (HWY_UNLIKELY(tiny)) {
        Heads<T> one = heads;
        one.in = in;
        one.out = out;
        one.cache = cache;
        one.count = 1;
        one.next = nullptr;
        if (heads.scale) one.scale = heads.scale + h * heads.scale_head;
        if constexpr (C::kNorm) {
          one.rstd = heads.rstd + (h - normed);
          if constexpr (kFixed > 0)
            FoldWeights<C::kInterleaved>(*heads.layout, heads.cos, heads.sin, heads.weight, heads.folded);
        }
        DoHeads<C, kStore, false, 0>(one);
        continue;
      }
    }
    Head<C, kStore, kNative, kFixed>{heads, *heads.layout, in, out, cache, rstd, inverse_scale, blocks, table}.All();
  }
}

// The heads of a token: by a kernel that knows how long they are, where there is one.
template <class C, int kStore, bool kNative>
HWY_INLINE void ChooseHeads(const Heads<typename C::T>& heads) {
  if constexpr (kNative) {
    const Layout& layout = *heads.layout;
    if (heads.ordinary_weights && layout.part[0].length == 0 && layout.part[3].length == 0 && !layout.part[1].tail) {
      constexpr int kUnit = C::kInterleaved ? 2 : 1;  // blocks of a head of 64 elements
      switch (layout.part[1].blocks) {
        case kUnit: return DoHeads<C, kStore, true, kUnit>(heads);
        case 2 * kUnit: return DoHeads<C, kStore, true, 2 * kUnit>(heads);
        case 4 * kUnit: return DoHeads<C, kStore, true, 4 * kUnit>(heads);
        default: break;
      }
    }
  }
  if constexpr (C::kNorm && !C::kReference) {
    FoldWeights<C::kInterleaved>(*heads.layout, heads.cos, heads.sin, heads.weight, heads.folded);
  }
  DoHeads<C, kStore, kNative, 0>(heads);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

// The rows of v in their cache: as parts outside the rotated one, of which only the cache is written.
template <class T>
HWY_NOINLINE void StoreV(const RopeCall& call, const RowPlan& plan) {
  using Raw = typename T::Raw;
  using C = Config<T, false, false, false>;
  const rope_params& p = call.params;
  const bool same = call.variant.cache_dtype == T::kDtype;
  const auto* v = static_cast<const Raw*>(call.tensors.v) + plan.batch * p.v.batch + plan.token * p.v.token;
  const int64_t base = plan.slot / p.page_size * p.v_cache.batch + plan.slot % p.page_size * p.v_cache.token;
  const Layout layout({p.v_dim, 0, 0, 0}), padded = PaddedLayout(layout);
  Heads<T> heads = {};
  heads.layout = &layout;
  heads.padded = &padded;
  heads.e4m3 = call.variant.cache_dtype == kRopeE4M3;
  const hn::Vec<D16> no_blocks[1] = {hn::Zero(d16)};
  const V no_table[1] = {hn::Zero(df)};
  for (int64_t h = 0; h < p.k_heads; ++h) {
    const Raw* in = v + h * p.v.head;
    const int64_t at = base + h * p.v_cache.head;
    if (same) {
      std::memcpy(static_cast<Raw*>(call.tensors.v_cache) + at, in, static_cast<size_t>(p.v_dim) * sizeof(Raw));
      continue;
    }
    auto* cache = static_cast<uint8_t*>(call.tensors.v_cache) + at;
    const float scale = call.tensors.v_scale ? call.tensors.v_scale[h * p.v_scale_head] : p.v_scale;
    const V inverse_scale = hn::Set(df, 1.0f / scale);
    auto* out = const_cast<Raw*>(in);  // nothing is written there
    if (layout.needs_padding) {
      Raw block[kBlock] = {};
      uint8_t codes[kBlock];
      std::memcpy(block, in, static_cast<size_t>(p.v_dim) * sizeof(Raw));
      Head<C, kStoreFp8, false, 0>{heads, padded, block, block, codes, hn::Zero(df), inverse_scale, no_blocks, no_table}
          .Rest(padded.part[0]);
      std::memcpy(cache, codes, static_cast<size_t>(p.v_dim));
    } else {
      Head<C, kStoreFp8, false, 0>{heads, layout, in, out, cache, hn::Zero(df), inverse_scale, no_blocks, no_table}
          .Rest(layout.part[0]);
    }
  }
}

// Every head of a token of q or k, in or out of place: filled with NaN, or copied.
template <class Raw>
void FillToken(const void* in, void* out, const rope_strides& from, const rope_strides& to, const RowPlan& plan,
               int64_t heads, int64_t head_dim, const Raw* value) {
  if (!value && in == out) return;
  const Raw* source = static_cast<const Raw*>(in) + plan.batch * from.batch + plan.token * from.token;
  Raw* target = static_cast<Raw*>(out) + plan.batch * to.batch + plan.token * to.token;
  for (int64_t h = 0; h < heads; ++h) {
    if (value) {
      std::fill_n(target + h * to.head, head_dim, *value);
    } else {
      std::memmove(target + h * to.head, source + h * from.head, static_cast<size_t>(head_dim) * sizeof(Raw));
    }
  }
}

template <class C, bool kNative>
HWY_NOINLINE void RopeRows(const RopeCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                           void* scratch_memory) {
  using T = typename C::T;
  using Raw = typename C::Raw;
  constexpr bool kEvenOddHalves = kEvenOdd<T, false>;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  const RopeVariant& variant = call.variant;
  Scratch& scratch = *static_cast<Scratch*>(scratch_memory);
  const Layout layout = MakeLayout(p, C::kInterleaved), padded = PaddedLayout(layout);

  Heads<T> q = {};
  q.in_head = p.q.head;
  q.out_head = p.q_out.head;
  q.count = p.q_heads;
  q.at_once = kNormedBytes / (p.head_dim * static_cast<int64_t>(sizeof(Raw))) / kLanes * kLanes;
  q.at_once = std::clamp<int64_t>(q.at_once, kLanes, kNormedAtOnce);
  q.head_dim = p.head_dim;
  q.layout = &layout;
  q.padded = &padded;
  q.scratch = &scratch;
  q.cos = scratch.cos;
  q.sin = scratch.sin;
  q.weight = scratch.q_weight;
  q.folded = scratch.q_folded;
  q.rstd = scratch.q_rstd;
  q.squares = scratch.q_squares;
  q.eps = p.eps;
  q.ordinary_weights = true;
  q.zero_centered = variant.weight == kRopeZeroCenteredWeight;
  q.round_products = variant.table_dtype == kRopeNoDtype || variant.table_dtype == variant.dtype;
  Heads<T> k = q;
  k.in_head = p.k.head;
  k.out_head = t.k_out                            ? p.k_out.head
               : variant.cache_dtype == T::kDtype ? p.k_cache.head
                                                  : 0;  // none: only stored, as fp8
  k.cache_head = p.k_cache.head;
  k.scale = t.k_scale;
  k.scale_value = p.k_scale;
  k.scale_head = p.k_scale_head;
  k.count = p.k_heads;
  k.weight = scratch.k_weight;
  k.folded = scratch.k_folded;
  k.rstd = scratch.k_rstd;
  k.squares = scratch.k_squares;
  k.e4m3 = variant.cache_dtype == kRopeE4M3;
  if constexpr (C::kNorm) {
    FillWeights<C::kInterleaved, kEvenOddHalves>(call, layout, t.q_weight, scratch.q_weight);
    q.ordinary_weights = OrdinaryWeights(layout, scratch.q_weight);
    if (t.k) {
      FillWeights<C::kInterleaved, kEvenOddHalves>(call, layout, t.k_weight, scratch.k_weight);
      k.ordinary_weights = OrdinaryWeights(layout, scratch.k_weight);
    }
  }

  if (call.variant.table_dtype == kRopeNoDtype) FillTurns<C::kInterleaved, kEvenOddHalves>(call, scratch);

  // The sums of squares of a token are made while the heads of the one before are rotated.
  constexpr bool kSumsAhead = C::kNorm && !C::kReference;
  const bool sums_ahead = kSumsAhead && q.count <= q.at_once && k.count <= k.at_once;
  const auto tokens_ahead = [&](int64_t heads) {
    const int64_t bytes = heads * p.head_dim * static_cast<int64_t>(sizeof(Raw));
    return std::max<int64_t>(1, kPrefetchBytes / std::max<int64_t>(1, bytes)) + sums_ahead;
  };
  const int64_t q_ahead = tokens_ahead(p.q_heads), k_ahead = tokens_ahead(p.k_heads);

  if constexpr (kSumsAhead) {
    // Sums of heads that are not there are made too, of something.
    const auto clear = [](float* squares, int64_t count) ROPEWALK_ATTR {
      if (count < kFewHeads) return;
      for (int64_t h = count; h % kLanes != 0; ++h) hn::Store(hn::Zero(df), df, squares + h * kLanes);
    };
    clear(scratch.q_squares, std::min(q.count, q.at_once));
    clear(scratch.k_squares, std::min(k.count, k.at_once));
  }

  const auto in_row = [&](const void* in, const rope_strides& strides, int64_t batch, int64_t token) {
    return static_cast<const Raw*>(in) + batch * strides.batch + token * strides.token;
  };
  int64_t normed = -1;  // the row whose 1 / rms is there

  for (int64_t row = begin; row < end; ++row) {
    const RowPlan plan = PlanRow(call, row, scratch.positions);
    if (plan.fault != kRopeFaultNone) first_fault->Report(row, plan);
    if (plan.left_out || plan.fault == kRopeFaultPosition || plan.fault == kRopeFaultAxis) {
      const Raw* value = plan.left_out ? nullptr : &T::kNan;
      FillToken<Raw>(t.q, t.q_out, p.q, p.q_out, plan, p.q_heads, p.head_dim, value);
      if (t.k_out) FillToken<Raw>(t.k, t.k_out, p.k, p.k_out, plan, p.k_heads, p.head_dim, value);
      continue;
    }
    q.in = in_row(t.q, p.q, plan.batch, plan.token);
    if (t.k) k.in = in_row(t.k, p.k, plan.batch, plan.token);
    if constexpr (C::kNorm) {
      if (normed != row) {
        Rstds<C, kNative>(q, q.in, std::min(q.at_once, q.count));
        if (t.k) Rstds<C, kNative>(k, k.in, std::min(k.at_once, k.count));
      }
      const bool ahead = sums_ahead && row + 1 < end;
      const int64_t batch = (row + 1) / p.tokens, token = (row + 1) % p.tokens;
      q.next = ahead ? in_row(t.q, p.q, batch, token) : nullptr;
      k.next = ahead && t.k ? in_row(t.k, p.k, batch, token) : nullptr;
    }
    FillCosSin<C::kInterleaved, kEvenOddHalves>(call, plan, scratch);

    q.prefetch = row + q_ahead < end ? q_ahead * p.q.token : 0;
    q.out = static_cast<Raw*>(t.q_out) + plan.batch * p.q_out.batch + plan.token * p.q_out.token;
    ChooseHeads<C, kNoStore, kNative>(q);
    const bool store = plan.slot >= 0;
    bool k_left = false;  // to be stored alone, and not stored
    if (t.k) {
      k.prefetch = row + k_ahead < end ? k_ahead * p.k.token : 0;
      if (t.k_out) k.out = static_cast<Raw*>(t.k_out) + plan.batch * p.k_out.batch + plan.token * p.k_out.token;
      if (store && t.k_cache) {
        const int64_t at = plan.slot / p.page_size * p.k_cache.batch + plan.slot % p.page_size * p.k_cache.token;
        if (variant.cache_dtype != T::kDtype) {
          k.cache = static_cast<uint8_t*>(t.k_cache) + at;
          ChooseHeads<C, kStoreFp8, kNative>(k);
        } else if (t.k_out) {
          k.cache = static_cast<Raw*>(t.k_cache) + at;
          ChooseHeads<C, kStoreSame, kNative>(k);
        } else {
          k.out = static_cast<Raw*>(t.k_cache) + at;  // the cache is all the output there is
          ChooseHeads<C, kNoStore, kNative>(k);
        }
      } else if (t.k_out) {
        ChooseHeads<C, kNoStore, kNative>(k);
      } else {
        k_left = true;
      }
    }
    if constexpr (kSumsAhead) {
      if (q.next) {
        RstdsOfSquares<T, kNative>(q, q.count);
        if (k_left) {
          Rstds<C, kNative>(k, k.next, k.count);  // no head was rotated to make their squares beside
        } else if (t.k) {
          RstdsOfSquares<T, kNative>(k, k.count);
        }
        normed = row + 1;
      }
    }
    if (store && t.v_cache) StoreV<T>(call, plan);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// From the variant to the function

template <class T, bool kNative, bool... kChosen>
CpuKernel Choose(const RopeVariant& v) {
  if constexpr (sizeof...(kChosen) == 3) {
    return RopeRows<Config<T, kChosen...>, kNative>;
  } else {
    constexpr size_t kNext = sizeof...(kChosen);
    const bool value = kNext == 0 ? v.pairing == ROPEWALK_INTERLEAVED : kNext == 1 ? v.norm != 0 : v.rounding != 0;
    return value ? Choose<T, kNative, kChosen..., true>(v) : Choose<T, kNative, kChosen..., false>(v);
  }
}

CpuKernel ChooseKernel(const RopeVariant& v) {
  switch (v.dtype) {
    case kRopeF32: return Choose<F32, false>(v);
    case kRopeF16: return Choose<F16, false>(v);
    default: return Choose<BF16, false>(v);
  }
}

#if HWY_TARGET == HWY_AVX3
// With the CPU's own bfloat16 rounding.
template <bool... kChosen>
CpuKernel ChooseNative(const RopeVariant& v) {
  if constexpr (sizeof...(kChosen) == 2) {
    return RopeRows<Config<BF16, kChosen..., false>, true>;
  } else {
    const bool value = sizeof...(kChosen) == 0 ? v.pairing == ROPEWALK_INTERLEAVED : v.norm != 0;
    return value ? ChooseNative<kChosen..., true>(v) : ChooseNative<kChosen..., false>(v);
  }
}

CpuKernel ChooseBf16Kernel(const RopeVariant& v) {
  return v.dtype == kRopeBF16 && v.rounding == kRopeRoundFused ? ChooseNative<>(v) : ChooseKernel(v);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace ropewalk
HWY_AFTER_NAMESPACE();
