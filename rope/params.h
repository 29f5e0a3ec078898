// What every rope kernel receives beside its tensors: one plain struct, the same bytes on every compiler. Strides are
// in elements of the tensor's own dtype; a stride of a dimension that the tensor lacks, or of size 1, is 0.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPE_PARAMS_H_
#define ROPEWALK_ROPE_PARAMS_H_

#include "rope/kernel_types.h"

// Values of the variant's dtype fields.
enum {
  kRopeNoDtype = 0,
  kRopeF32 = 1,
  kRopeF16 = 2,
  kRopeBF16 = 3,
  kRopeE4M3 = 4,
  kRopeE5M2 = 5,
  kRopeI32 = 6,
  kRopeI64 = 7
};
enum { kRopeNoWeight = 0, kRopeWeight = 1, kRopeZeroCenteredWeight = 2 };
enum { kRopeRoundFused = 0, kRopeRoundReference = 1 };
// Whether k goes to a cache; only: and is not written back.
enum { kRopeNoStore = 0, kRopeStore = 1, kRopeStoreOnly = 2 };

// Why a token was poisoned or skipped; the higher half of a fault record.
enum { kRopeFaultNone = 0, kRopeFaultPosition = 1, kRopeFaultSlot = 2, kRopeFaultAxis = 3 };

// The strides of a [batch?, tokens, heads, dim] tensor; the last is 1.
typedef struct {
  rw_i64 batch, token, head;
} rope_strides;

typedef struct {
  rw_i64 batch, tokens;                // the work is batch x tokens rows
  rw_i64 rows;                         // of the table
  rw_i64 page_size, slots;             // of the caches: slot = page * page_size + place in the page; slots in all
  rope_strides q, k, q_out, k_out, v;  // q_out and k_out are those of q and k when in place
  rope_strides k_cache, v_cache;       // batch: page, token: place in the page
  rw_i64 positions_axis, positions_batch, positions_token;
  rw_i64 offsets_batch, offsets_token;
  rw_i64 slots_batch, slots_token;
  rw_i64 cos_batch, cos_row, cos_pair;
  rw_i64 sin_batch, sin_row, sin_pair;
  rw_i32 q_heads, k_heads;  // k_heads 0: no k
  rw_i32 head_dim, v_dim;
  rw_i32 rotary_dim, rotary_offset;
  rw_i32 axes;                        // rows of positions; 1 without a map
  rw_i32 k_scale_head, v_scale_head;  // strides of the scales
  float k_scale, v_scale;             // used where the scale's tensor is null
  float eps;
  float attention_scaling;  // multiplies cos and sin computed from turns
  rw_i32 reserved;
} rope_params;

#define ROPE_PARAMS_SIZE 368
#if defined(__cplusplus)
static_assert(sizeof(rope_params) == ROPE_PARAMS_SIZE, "rope_params must have one layout on every compiler");
#endif

#endif  // ROPEWALK_ROPE_PARAMS_H_
