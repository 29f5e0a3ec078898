// What the OpenCL C kernels take: pointers in the order of RopeTensors, then turns and the record of faults, then one
// struct by value; the gradient's likewise, with pointers of its own. Read by g++ and by OpenCL C.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_SPIRV_KERNEL_ARGS_H_
#define ROPEWALK_BACKENDS_SPIRV_KERNEL_ARGS_H_

#include "rope/fault.h"
#include "rope/params.h"

// Specialisation constants, by their number. All are 32-bit integers.
enum {
  kRopeSpecInterleaved = 0,  // the pairing
  kRopeSpecNorm = 1,
  kRopeSpecWeightDtype = 2,  // kRopeNoDtype: no weight
  kRopeSpecReference = 3,    // rounding
  kRopeSpecTableDtype = 4,   // kRopeNoDtype: angles from turns
  kRopeSpecTableVector = 5,  // 1: several elements of the table at a time
  kRopeSpecAxes = 6,
  kRopeSpecCacheDtype = 7,  // kRopeNoDtype: no store
  kRopeSpecOutOfPlace = 8,
  kRopeSpecStoreOnly = 9,  // k is not written back
  kRopeSpecUnits = 10,     // units that a lane keeps in registers, 1, 2 or 4; 0: it takes any number, one at a time
  kRopeSpecLanes = 11,  // work-items of a head if that is 4, 8 or 16 and each has all its units; 0: any, by the shape
  kRopeSpecSums = kRopeSpecCacheDtype,  // of the gradient, which stores nothing: 1: the weights' sums are made
  kRopeSpecCount = 12
};
// A constant with this value means: read the choice from rope_spirv_shape. Units and lanes never have it.
enum { kRopeSpecArgument = 255 };

// Values that are the same for every work-item, so that the host computes them once and not each work-item.
typedef struct {
  rw_u64 page_multiplier;  // page of a slot: the upper half of 2 slot x page_multiplier, shifted by page_shift
  rw_i32 page_shift;
  rw_i32 lanes;            // work-items of a head
  rw_i32 lane_multiplier;  // 2^16 / lanes, rounded up
  rw_i32 heads_at_once;    // of a sub-group: 16 / lanes
  rw_i32 units;            // of a head: pairs of vectors that are rotated
  rw_i32 rest, before;     // vectors outside the rotated part that matter, and how many of them lie before it
  rw_i32 head_vectors, v_vectors;
  rw_i32 heads, all_heads;                             // of q and k; with those of v
  rw_i32 positions_dtype, offsets_dtype, slots_dtype;  // kRopeNoDtype: none
  rw_i32 check_axes;                                   // they are the caller's
  rw_i32 store_k, store_v, zero_centered;
  rw_u32 sine_flip;  // the sign bit if inverse
  float inverse_head_dim;
  rw_i32 sub_groups;     // of a work-group
  rw_i32 step;           // heads of q, k and v from one turn of a sub-group to its next: of all sub-groups of a token
  rw_i32 written_heads;  // of q and k whose rows are written back: all, or those of q
  unsigned char choices[kRopeSpecCount];  // the values of the constants that are kRopeSpecArgument
} rope_spirv_shape;

typedef struct {
  rope_params params;
  rope_spirv_shape shape;
} rope_spirv_params;

#define ROPE_SPIRV_PARAMS_SIZE (ROPE_PARAMS_SIZE + 112)
#if defined(__cplusplus)
static_assert(sizeof(rope_spirv_params) == ROPE_SPIRV_PARAMS_SIZE, "rope_spirv_params must have one layout");
#endif

// The kernel's arguments: pointers, then rope_spirv_params. The other kernels have fewer.
enum { kRopeSpirvTurns = 17, kRopeSpirvFault = 18, kRopeSpirvPointers = 19, kRopeSpirvArguments = 20 };

// ---------------------------------------------------------------------------------------------------------------------
// The gradient: its kernel, and the one that adds up what the first one's work-groups leave

typedef struct {
  rope_params params;         // of the call that turns the gradient back
  rope_spirv_shape shape;     // likewise
  rope_strides q, k;          // of x
  rw_i32 q_groups, k_groups;  // work-groups that take heads of q, and, behind them, heads of k
} rope_backward_params;

#define ROPE_BACKWARD_PARAMS_SIZE (ROPE_SPIRV_PARAMS_SIZE + 56)
#if defined(__cplusplus)
static_assert(sizeof(rope_backward_params) == ROPE_BACKWARD_PARAMS_SIZE, "rope_backward_params must have one layout");
#endif

// Its pointers: the tensors from q to k_out, x of q and of k, the sums, turns, the record of faults.
enum {
  kRopeBackwardQ = 11,
  kRopeBackwardK = 12,
  kRopeBackwardSums = 13,
  kRopeBackwardTurns = 14,
  kRopeBackwardFault = 15,
  kRopeBackwardPointers = 16
};

typedef struct {
  rw_i32 head_dim;
  rw_i32 stride;              // floats from the sums of a work-group to those of the next
  rw_i32 q_groups, k_groups;  // work-groups of the gradient's kernel
} rope_sums_params;

#define ROPE_SUMS_PARAMS_SIZE 16
#if defined(__cplusplus)
static_assert(sizeof(rope_sums_params) == ROPE_SUMS_PARAMS_SIZE, "rope_sums_params must have one layout");
#endif

// Its pointers: the sums, the gradients of q_weight and of k_weight.
enum { kRopeSumsPointers = 3 };
// Elements of a weight that a work-group takes.
#define ROPE_SUMS_ELEMENTS 16
// Work-items of one at most.
#define ROPE_SUMS_MOST_ITEMS 128

#define ROPE_SUB_GROUP 16

#endif  // ROPEWALK_BACKENDS_SPIRV_KERNEL_ARGS_H_
