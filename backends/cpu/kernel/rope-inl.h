// The CPU kernel: one body for every stage and dtype, compiled once for each Highway target (backends/cpu/dispatch.cc).
// Its parts are read again for each: HWY_TARGET_TOGGLE changes with the target. Each part includes what it builds on.
//
// A token's sines are computed once, for all its heads (tables-inl.h). A head is worked on by vectors, or by pairs
// of them, the last ones of a part with what is behind it left out (store-inl.h, heads-inl.h). Rows, and the
// choice among variants, are here.
// SPDX-License-Identifier: Apache-2.0
#if defined(ROPEWALK_BACKENDS_CPU_KERNEL_ROPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ROPEWALK_BACKENDS_CPU_KERNEL_ROPE_INL_H_
#undef ROPEWALK_BACKENDS_CPU_KERNEL_ROPE_INL_H_
#else
#define ROPEWALK_BACKENDS_CPU_KERNEL_ROPE_INL_H_
#endif

#include "backends/cpu/kernel/heads-inl.h"

ROPEWALK_BEFORE_KERNEL
namespace ropewalk {
namespace HWY_NAMESPACE {

constexpr int64_t kPrefetchBytes = 8192;  // of a tensor, ahead of the work on it

// ---------------------------------------------------------------------------------------------------------------------
// Rows

// The rows of v in their cache.
template <class T>
HWY_NOINLINE void StoreV(const RopeCall& call, const RowPlan& plan) {
  using Raw = typename T::Raw;
  const rope_params& p = call.params;
  const auto* v = static_cast<const Raw*>(call.tensors.v) + plan.batch * p.v.batch + plan.token * p.v.token;
  const int64_t base = plan.slot / p.page_size * p.v_cache.batch + plan.slot % p.page_size * p.v_cache.token;
  for (int64_t h = 0; h < p.k_heads; ++h) {
    const Raw* in = v + h * p.v.head;
    const int64_t at = base + h * p.v_cache.head;
    if (call.variant.cache_dtype == T::kDtype) {
      std::memcpy(static_cast<Raw*>(call.tensors.v_cache) + at, in, static_cast<size_t>(p.v_dim) * sizeof(Raw));
      continue;
    }
    const float scale = call.tensors.v_scale ? call.tensors.v_scale[h * p.v_scale_head] : p.v_scale;
    Output<Config<T, false, false, false>, true, false>{nullptr, static_cast<uint8_t*>(call.tensors.v_cache) + at,
                                                        call.variant.cache_dtype, hn::Set(df, 1.0f / scale)}
        .Copy(in, {0, p.v_dim, 0});
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

// The heads of a token: as many at a time as `at_once` says.
template <class C, bool kStore, bool kNative>
HWY_NOINLINE void DoHeads(const Heads<typename C::T>& heads) {
  if constexpr (C::kNorm && !C::kReference) {
    FoldWeights<C::kInterleaved>(*heads.parts, heads.cos, heads.sin, heads.weight, heads.folded);
  }
  for (int64_t begin = 0; begin < heads.count; begin += heads.at_once) {
    const int64_t count = std::min(heads.at_once, heads.count - begin);
    if constexpr (C::kNorm) {
      if (begin > 0) Rstds<C, kNative>(heads, heads.in + begin * heads.in_head, count);
    }
    Group<C, kStore, kNative>{heads, *heads.parts, begin, count}.All();
  }
}

template <class C, bool kNative>
HWY_NOINLINE void RopeRows(const RopeCall& call, int64_t begin, int64_t end, FirstFault* first_fault,
                           void* scratch_memory) {
  using T = typename C::T;
  using Raw = typename C::Raw;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  const RopeVariant& variant = call.variant;
  Scratch& scratch = *static_cast<Scratch*>(scratch_memory);
  const Parts parts = MakeParts<T, C::kInterleaved>(p);

  Heads<T> q = {};
  q.in_head = p.q.head;
  q.out_head = p.q_out.head;
  q.count = p.q_heads;
  q.at_once = kNormedBytes / (p.head_dim * static_cast<int64_t>(sizeof(Raw))) / kLanes * kLanes;
  q.at_once = std::clamp<int64_t>(q.at_once, kLanes, kNormedAtOnce);
  q.head_dim = p.head_dim;
  q.parts = &parts;
  q.cos = scratch.cos;
  q.sin = scratch.sin;
  q.weight = scratch.q_weight;
  q.folded = scratch.q_folded;
  q.rstd = scratch.q_rstd;
  q.squares = scratch.q_squares;
  q.eps = p.eps;
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
  k.cache_dtype = variant.cache_dtype;
  if constexpr (C::kNorm) {
    FillWeights<T, C::kInterleaved>(call, parts, t.q_weight, scratch.q_weight);
    if (t.k) FillWeights<T, C::kInterleaved>(call, parts, t.k_weight, scratch.k_weight);
  }

  if (call.variant.table_dtype == kRopeNoDtype) FillTurns(call, scratch);

  // The sums of squares of a token are made while the heads of the one before are rotated.
  constexpr bool kSumsAhead = C::kNorm && !C::kReference;
  const bool sums_ahead = kSumsAhead && q.count <= q.at_once && k.count <= k.at_once && p.head_dim <= kSquaresAtOnce;
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
    FillCosSin<T, C::kInterleaved>(call, plan, parts, scratch);

    q.prefetch = row + q_ahead < end ? q_ahead * p.q.token : 0;
    q.out = static_cast<Raw*>(t.q_out) + plan.batch * p.q_out.batch + plan.token * p.q_out.token;
    DoHeads<C, false, kNative>(q);
    const bool store = plan.slot >= 0;
    bool k_left = false;  // to be stored alone, and not stored
    if (t.k) {
      k.prefetch = row + k_ahead < end ? k_ahead * p.k.token : 0;
      if (t.k_out) k.out = static_cast<Raw*>(t.k_out) + plan.batch * p.k_out.batch + plan.token * p.k_out.token;
      if (store && t.k_cache) {
        const int64_t at = plan.slot / p.page_size * p.k_cache.batch + plan.slot % p.page_size * p.k_cache.token;
        const bool fp8 = variant.cache_dtype != T::kDtype;
        k.cache = static_cast<char*>(t.k_cache) + at * (fp8 ? 1 : static_cast<int64_t>(sizeof(Raw)));
        if (fp8 || t.k_out) {
          DoHeads<C, true, kNative>(k);
        } else {
          k.out = static_cast<Raw*>(k.cache);  // the cache is all the output there is
          DoHeads<C, false, kNative>(k);
        }
      } else if (t.k_out) {
        DoHeads<C, false, kNative>(k);
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

#endif
