// Which work-item takes what: the arithmetic that the OpenCL C kernel and the check of its plans share, so that what is
// checked is what runs. `vector`: elements of an access. Read by g++ and by OpenCL C.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_SPIRV_KERNEL_INDEX_H_
#define ROPEWALK_BACKENDS_SPIRV_KERNEL_INDEX_H_

#include "backends/spirv/kernel/args.h"

#if defined(__cplusplus)
#define ROPE_INDEX constexpr
#else
#define ROPE_INDEX static inline __attribute__((always_inline))
#endif

// Units that a lane can keep in registers, by the bytes of an access.
#define ROPE_MOST_UNITS(access_bytes) ((access_bytes) == 16 ? 2 : 4)
// Heads that a sub-group works on side by side.
#define ROPE_HEADS_AT_ONCE(lanes) (ROPE_SUB_GROUP / (lanes))

// The head of its sub-group's that a work-item works on; heads_at_once or more: none, where lanes do not divide 16.
ROPE_INDEX rw_i32 rope_group_of(rw_i32 id, rw_i32 lane_multiplier) { return id * lane_multiplier >> 16; }
// The first head of a sub-group. Its next are one step on each.
ROPE_INDEX rw_i32 rope_first_head(rw_i32 share, rw_i32 sub_groups, rw_i32 sub_group, rw_i32 heads_at_once) {
  return (share * sub_groups + sub_group) * heads_at_once;
}

// In the gradient's kernel a sub-group takes every `step`-th row, the first of them by its place among those of q, or
// of k; `of_its_kind`: how many work-groups these have.
ROPE_INDEX rw_i32 rope_first_row(rw_i32 group, rw_i32 sub_groups, rw_i32 sub_group) {
  return group * sub_groups + sub_group;
}
ROPE_INDEX rw_i32 rope_row_step(rw_i32 of_its_kind, rw_i32 sub_groups) { return of_its_kind * sub_groups; }
// Floats of one set of sums: what a float can hold of them, then what it lacks.
ROPE_INDEX rw_i32 rope_sums_size(rw_i32 head_dim) { return 2 * head_dim; }
// Sets of a work-group: one for each head that it works on at once.
ROPE_INDEX rw_i32 rope_sums_of_group(rw_i32 sub_groups, rw_i32 heads_at_once) { return sub_groups * heads_at_once; }

// Neighbours share a vector, unless it has one element.
ROPE_INDEX rw_i32 rope_pairs_inside(rw_i32 interleaved, rw_i32 vector) { return interleaved && vector > 1; }
// The first element of the first vector of a unit, the distance to the second, and the pair of an element of the unit.
ROPE_INDEX rw_i32 rope_begin_of(rw_i32 interleaved, rw_i32 vector, rw_i32 rotary_offset, rw_i32 unit) {
  return rotary_offset + (interleaved && vector == 1 ? 2 : vector) * unit;
}
ROPE_INDEX rw_i32 rope_distance_of(rw_i32 interleaved, rw_i32 vector, rw_i32 rotary_dim) {
  return interleaved && vector == 1 ? 1 : rotary_dim / 2;
}
ROPE_INDEX rw_i32 rope_pair_at(rw_i32 interleaved, rw_i32 vector, rw_i32 rotary_dim, rw_i32 unit, rw_i32 i) {
  return !rope_pairs_inside(interleaved, vector) ? vector * unit + i
         : i < vector / 2                        ? vector / 2 * unit + i
                                                 : vector / 2 * unit + rotary_dim / 4 + i - vector / 2;
}
// The i-th vector outside the rotated part, `before` of which lie before it.
ROPE_INDEX rw_i32 rope_rest_at(rw_i32 vector, rw_i32 before, rw_i32 rotary_dim, rw_i32 i) {
  return vector * i + (i < before ? 0 : rotary_dim);
}

#endif  // ROPEWALK_BACKENDS_SPIRV_KERNEL_INDEX_H_
