// A checked call, ready for a backend: what lower() makes of ropewalk_rope_args.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include "base/status.h"
#include "frequencies/frequencies.h"
#include "rope/arguments.h"
#include "rope/params.h"

namespace ropewalk {

// The compile-time choices of a kernel; fields hold the constants of params.h. A backend may treat some of them as
// run-time values.
struct RopeVariant {
  uint8_t dtype = kRopeNoDtype;  // of q, k, v and the outputs
  uint8_t pairing = ROPEWALK_NEOX;
  uint8_t inverse = 0;
  uint8_t norm = 0;  // 1: RMS
  uint8_t weight = kRopeNoWeight;
  uint8_t weight_dtype = kRopeNoDtype;
  uint8_t rounding = kRopeRoundFused;
  uint8_t table_dtype = kRopeNoDtype;      // none: angles from turns
  uint8_t positions_dtype = kRopeNoDtype;  // none: 0, 1, 2, ..
  uint8_t offsets_dtype = kRopeNoDtype;    // none: no offsets
  uint8_t slots_dtype = kRopeNoDtype;
  uint8_t cache_dtype = kRopeNoDtype;  // none: no store
  uint8_t axes = 0;                    // pairs are mapped to rows of positions: 1 by the frequencies, 2 by the caller
  uint8_t store_k = kRopeNoStore;      // to k_cache; kRopeStoreOnly: k's own memory is not written
  uint8_t store_v = 0;                 // v_cache is there
  uint8_t out_of_place = 0;            // 1: q_out or k_out differs from its input

  bool operator==(const RopeVariant&) const = default;
};
static_assert(sizeof(RopeVariant) == 16, "hashed as bytes, as part of a kernel's key");

// The tensors of a call, once: what has a field, a pointer or a check for each of them expands this list.
// X(name, what its pointer points to), in the order of RopeTensors and of the OpenCL kernel's pointers. rope_cuda_args
// has an order of its own, by use. cos_sin is cos and sin here.
#define ROPE_TENSORS(X)                                                                            \
  X(q, void)                                                                                       \
  X(k, void)                                                                                       \
  X(positions, const void)                                                                         \
  X(offsets, const void)                                                                           \
  X(cos, const void)                                                                               \
  X(sin, const void)                                                                               \
  X(axes, const int32_t) /* the caller's; null: those of `frequencies`, if the variant has axes */ \
  X(q_weight, const void)                                                                          \
  X(k_weight, const void)                                                                          \
  X(q_out, void) /* q where in place */                                                            \
  X(k_out, void) /* null where k is only stored */                                                 \
  X(v, const void)                                                                                 \
  X(k_cache, void)                                                                                 \
  X(v_cache, void)                                                                                 \
  X(slots, const void)                                                                             \
  X(k_scale, const float) /* null: params.k_scale */                                               \
  X(v_scale, const float)

// Data pointers. On the host or on the device of the call.
struct RopeTensors {
#define X(name, type) type* name = nullptr;
  ROPE_TENSORS(X)
#undef X
};

struct RopeCall {
  RopeVariant variant;
  RopeTensors tensors;
  rope_params params;
  const ropewalk_frequencies* frequencies = nullptr;
  DLDevice device;
  void* stream = nullptr;
  void* sycl_queue = nullptr;  // a sycl::queue*, instead of the stream
  bool disable_pdl = false;    // programmatic dependent launch
  // Calls with the same number may share a plan. They differ only in their stream and in their addresses; the addresses
  // agree modulo 32 bytes, and tensors whose spans meet keep their distance. 0: the call shares with no other.
  uint64_t shape = 0;
};

// Else the angles come from a table.
inline bool NeedsFrequencies(const RopeCall& call) { return call.variant.table_dtype == kRopeNoDtype; }

// How the tensors were read: "batch of 2, 5 tokens, 8 heads of q, 2 of k, 64 elements of which 32 are rotated".
std::string ShapesText(const RopeCall& call);

std::span<const Arg> RopeDescription();
// How many arguments at most may be one value on the host: a binding keeps room for them.
inline constexpr int kMostHostScalars = 2;

// Whether lowering reads the tensor: one scale on the host, instead of which the params carry its value.
bool IsHostValue(const Arg& arg, const DLTensor& tensor);
// Scales on the host: read and checked when a call is lowered, and again when a later one is like it.
// Whether a tensor holds scales and lies on the host. Of scales on a device nothing is read.
bool HoldsHostScales(const Arg& arg, const DLTensor& tensor);
// The first of its scales that is of no use, as it or its inverse is no finite number above 0; -1: none.
int64_t FirstBadScale(const DLTensor& tensor);
// Fills call->tensors from the arguments; the variant and the params are theirs already.
void SetTensors(const ropewalk_rope_args& args, RopeCall* call);
// Checks the arguments and fills the call. Nothing is read from tensors' data but scales on the host.
Status LowerRope(const ropewalk_rope_args& args, void* stream, RopeCall* call);

}  // namespace ropewalk
