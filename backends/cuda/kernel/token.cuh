// A token: its place in the batch, its position and its slot, and what may be wrong with these.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_TOKEN_CUH_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_TOKEN_CUH_

#include "backends/cuda/kernel/shape.cuh"

namespace ropewalk {

// A token, as far as its heads do not matter.
struct Token {
  rw_i64 batch, token;
  char* q;           // where its heads of q begin, if strides are constants; else null
  char* k;           // the same for k, moved back so that heads of k count on from those of q
  rw_i64 slot;       // < 0: it is not stored
  bool left_out;     // it is padding, and its position is outside the table: it stays as it is
  bool poisoned;     // its position or an axis is wrong: its heads become NaN
};

// Numbers of heads are constants where the variant knows them.
template <class K>
__device__ __forceinline__ int QHeads(const rope_params& p) {
  return K::kQHeads ? K::kQHeads : p.q_heads;
}
template <class K>
__device__ __forceinline__ int KHeads(const rope_params& p) {
  return K::kQHeads ? K::kKHeads : p.k_heads;
}
template <class K>
__device__ __forceinline__ rw_i64 Offset(const rope_strides& s, rw_i64 batch, rw_i64 token, int head) {
  return (K::kBatched ? batch * s.batch : 0) + token * s.token + head * s.head;
}
template <class K>
__device__ __forceinline__ void SplitRow(const rope_params& p, rw_i64 row, rw_i64& batch, rw_i64& token) {
  batch = 0;
  token = row;
  if constexpr (K::kBatched) {
    batch = row / p.tokens;
    token = row - batch * p.tokens;
  }
}

template <class K>
__device__ __forceinline__ rw_i64 Index(rw_i64 token, rw_i64 stride) {
  return K::kDenseIndices ? token : token * stride;
}

// A position as it was loaded, and its offset.
template <class K>
struct LoadedPosition {
  typename IntOf<K::kPositionsDtype>::Type position;
  typename IntOf<K::kOffsetsDtype>::Type offset;
};
template <class K>
__device__ __forceinline__ LoadedPosition<K> LoadPosition(const rope_cuda_args& a, rw_i64 batch, rw_i64 token,
                                                          int axis) {
  const rope_params& p = a.params;
  LoadedPosition<K> loaded = {};
  if constexpr (K::kPositionsDtype != kRopeNoDtype) {
    loaded.position = LoadInt<K::kPositionsDtype>(
        a.positions, (K::kAxes ? axis * p.positions_axis : 0) + (K::kBatched ? batch * p.positions_batch : 0) +
            Index<K>(token, p.positions_token));
  } else {
    loaded.position = token;
  }
  if constexpr (K::kOffsetsDtype != kRopeNoDtype) {
    loaded.offset = LoadInt<K::kOffsetsDtype>(
        a.offsets, (K::kBatched ? batch * p.offsets_batch : 0) + Index<K>(token, p.offsets_token));
  }
  return loaded;
}
template <class K>
__device__ __forceinline__ rw_i64 Position(const LoadedPosition<K>& loaded) {
  return Widen(loaded.position) + Widen(loaded.offset);
}
// The position where it is used at once: no launch stands between, so that the compiler may widen it as it likes.
template <class K>
__device__ __forceinline__ rw_i64 PositionOf(const rope_cuda_args& a, rw_i64 batch, rw_i64 token, int axis) {
  const LoadedPosition<K> loaded = LoadPosition<K>(a, batch, token, axis);
  return rw_i64{loaded.position} + rw_i64{loaded.offset};
}

// Keeps the fault of the lowest row, under a lock: faults are rare.
__device__ __forceinline__ void RecordFault(rope_fault* fault, rw_i64 row, int kind, rw_i64 value, rw_i64 limit,
                                         rw_i64 tokens, int axis) {
  if (!fault) return;
  const rw_u64 key = static_cast<rw_u64>(row) * 4 + kind;
  if (key >= *static_cast<volatile rw_u64*>(&fault->key)) return;
  while (atomicCAS(&fault->lock, 0u, 1u) != 0u) __nanosleep(100);
  __threadfence();
  if (key < *static_cast<volatile rw_u64*>(&fault->key)) {
    fault->value = value;
    fault->limit = limit;
    fault->tokens = tokens;
    fault->axis = static_cast<rw_u32>(axis);
    *static_cast<volatile rw_u64*>(&fault->key) = key;
  }
  __threadfence();
  atomicExch(&fault->lock, 0u);
}

// The slot of a token as the caller gave it; -1 if there are no slots.
template <class K>
__device__ __forceinline__ typename IntOf<K::kSlotsDtype>::Type LoadSlot(const rope_cuda_args& a, const void* slots,
                                                                         rw_i64 batch, rw_i64 token) {
  if constexpr (K::kSlotsDtype == kRopeNoDtype) return -1;
  return LoadInt<K::kSlotsDtype>(slots, (K::kBatched ? batch * a.params.slots_batch : 0) +
                                              Index<K>(token, a.params.slots_token));
}

// Marks a token whose position has no row in the table or whose axes are wrong. Records the fault if this thread
// `reports`.
template <class K>
__device__ __forceinline__ void CheckToken(const rope_cuda_args& a, rw_i64 row, rw_i64 slot, rw_i64 position,
                                           bool reports, Token& t) {
  const rope_params& p = a.params;
  if constexpr (K::kCheckAxes) {
#pragma unroll 1
    for (int i = 0; i < K::kRotaryDim / 2; ++i) {
      const int axis = __ldg(a.axes + i);
      if (axis >= 0 && axis < p.axes) continue;
      t.poisoned = true;
      if (reports) RecordFault(a.fault, row, kRopeFaultAxis, axis, p.axes, p.tokens, i);
      return;
    }
  }
  if constexpr (Shape<K>::kTable) {
    // Look only at the positions that some pair uses: the others may hold anything.
    int last = -1;
#pragma unroll 1
    for (int i = 0; i < (K::kAxes ? K::kRotaryDim / 2 : 1); ++i) {
      const int axis = K::kAxes ? __ldg(a.axes + i) : 0;
      if (axis == last) continue;
      last = axis;
      if constexpr (K::kAxes) position = PositionOf<K>(a, t.batch, t.token, axis);
      if (static_cast<rw_u64>(position) < static_cast<rw_u64>(a.rows)) continue;
      const bool padding = K::kSlotsDtype != kRopeNoDtype && slot < 0;
      t.left_out = padding;
      t.poisoned = !padding;
      if (reports && !padding) RecordFault(a.fault, row, kRopeFaultPosition, position, a.rows, p.tokens, axis);
      return;
    }
  }
}

}  // namespace ropewalk

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_TOKEN_CUH_
