// The tensors of a call, once: what has a field, a pointer or a check for each of them expands this list.
// SPDX-License-Identifier: Apache-2.0
#pragma once

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
