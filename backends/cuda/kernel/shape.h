// Which token and which heads a thread works on, and what sizes follow from that. The kernel, the plan and the check of
// the plan all compute it here: the kernel for its own thread, the plan for its sizes, the check for every thread.
//
// A group of `lanes` threads works on one head at a time. Threads of a warp that fill no group are idle. Each token of
// a block gets `token_groups` of the block's groups, and in a turn a group takes `rounds` heads of its token:
//
//   a warp of 4 groups, token_groups 4, rounds 2:  group 0 takes heads 0 and 4, group 1 heads 1 and 5, ..
//   the same with token_groups 1, rounds 1:        every group takes head 0 of a token of its own, then head 1, ..
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_H_
#define ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_H_

#include "rope/kernel_types.h"

typedef struct {
  int threads;       // of a block
  int lanes;         // of a group
  int rounds;        // heads that a group takes in a turn
  int token_groups;  // groups that share the heads of a token: a multiple of a warp's groups, or a divisor of them
} rope_grid;

#if defined(__cplusplus)
namespace ropewalk {

ROPEWALK_HOST_DEVICE constexpr int GroupsPerWarp(rope_grid g) { return 32 / g.lanes; }
// Groups of a warp that work on the same token.
ROPEWALK_HOST_DEVICE constexpr int WarpShare(rope_grid g) {
  return g.token_groups < GroupsPerWarp(g) ? g.token_groups : GroupsPerWarp(g);
}
ROPEWALK_HOST_DEVICE constexpr int WarpTokens(rope_grid g) { return GroupsPerWarp(g) / WarpShare(g); }
ROPEWALK_HOST_DEVICE constexpr int TokenWarps(rope_grid g) { return g.token_groups / WarpShare(g); }
ROPEWALK_HOST_DEVICE constexpr int BlockTokens(rope_grid g) { return g.threads / 32 / TokenWarps(g) * WarpTokens(g); }
// Heads of a token that a warp, and that all its warps, take in a turn.
ROPEWALK_HOST_DEVICE constexpr int WarpHeads(rope_grid g) { return WarpShare(g) * g.rounds; }
ROPEWALK_HOST_DEVICE constexpr int HeadsAtOnce(rope_grid g) { return TokenWarps(g) * WarpHeads(g); }

// Whether every token of a block gets as many groups as it should, and no group is left over.
ROPEWALK_HOST_DEVICE constexpr bool Deals(rope_grid g) {
  return g.lanes >= 1 && g.lanes <= 32 && g.threads >= 32 && g.threads % 32 == 0 && g.rounds >= 1 &&
         g.token_groups >= 1 &&
         (g.token_groups < GroupsPerWarp(g)
              ? GroupsPerWarp(g) * g.lanes == 32 && GroupsPerWarp(g) % g.token_groups == 0
              : g.token_groups % GroupsPerWarp(g) == 0 && g.threads / 32 % (g.token_groups / GroupsPerWarp(g)) == 0);
}

// These are for one thread of a block. An idle thread counts to the group beside it.
ROPEWALK_HOST_DEVICE constexpr bool Idle(rope_grid g, int thread) {
  return GroupsPerWarp(g) * g.lanes != 32 && thread % 32 >= GroupsPerWarp(g) * g.lanes;
}
ROPEWALK_HOST_DEVICE constexpr int GroupInWarp(rope_grid g, int thread) {
  return Idle(g, thread) ? GroupsPerWarp(g) - 1 : thread % 32 / g.lanes;
}
// Which token of the block it works on.
ROPEWALK_HOST_DEVICE constexpr int TokenInBlock(rope_grid g, int thread) {
  return thread / 32 / TokenWarps(g) * WarpTokens(g) + GroupInWarp(g, thread) / WarpShare(g);
}
// Of the heads that a block takes in a turn: the first one of the thread's warp, and the first one of its group. In
// round r the group takes the head WarpShare * r behind its first.
ROPEWALK_HOST_DEVICE constexpr int WarpFirst(rope_grid g, int thread) {
  return thread / 32 % TokenWarps(g) * WarpHeads(g);
}
ROPEWALK_HOST_DEVICE constexpr int GroupFirst(rope_grid g, int thread) {
  return WarpFirst(g, thread) + GroupInWarp(g, thread) % WarpShare(g);
}

// The choices that decide the sizes of a variant. RopeCudaKey explains them.
struct rope_choices {
  int bytes;  // of an element
  int head_dim, rotary_dim, rotary_offset, v_dim;
  int vector, lanes, in_flight, flat, threads, token_groups, packed;
  bool few, interleaved;
  bool rest_matters;  // the rest is normalised, copied or stored
  bool store_k, store_v;
  bool converts;  // the cache is of another dtype
};

struct rope_shape {
  rope_grid grid;
  bool pairs_inside;  // neighbours share a vector, unless it has one element
  int units, units_per_lane;
  int before, rest, rest_per_lane;  // vectors outside the rotated part, and how many of them lie in front of it
  bool staged;                      // through shared memory, where an asynchronous copy can carry a vector
  // The layout `flat` (flat.cuh). A vector may then have any even number of elements, as no access carries it: lanes
  // of a warp fetch and write its heads side by side in 16 bytes each. Of each head that is `span` elements, from
  // `span_begin` on.
  bool flat;
  int span_begin, span, span_bytes;
  // Flat only: whether both vectors of a unit of neighbours follow each other, so that all its pairs do. Vectors of 8
  // lie apart here too: that is faster in shared memory, and 4 pairs are enough for one load of cosines.
  bool adjacent;
  int run;                        // how many pairs of a unit follow each other
  int block_heads;                // heads that a block takes in a turn, over all its tokens
  bool linear;                    // a warp's heads follow each other in memory
  bool v_rides;                   // heads of v, of the same vectors, are fetched behind those of q and k
  bool staged_codes;              // fp8 codes pass through shared memory, where no access carries those of a vector
  int stage_bytes, shared_bytes;  // of one stage; of the block
};

ROPEWALK_HOST_DEVICE constexpr rope_shape ShapeOf(const rope_choices& c) {
  rope_shape s = {};
  const int vector_bytes = c.vector * c.bytes;
  s.pairs_inside = c.interleaved && c.vector > 1;
  s.units = c.rotary_dim / (2 * c.vector);
  s.units_per_lane = (s.units + c.lanes - 1) / c.lanes;
  s.before = c.rotary_offset / c.vector;
  s.rest = c.rest_matters ? (c.head_dim - c.rotary_dim) / c.vector : 0;
  s.rest_per_lane = (s.rest + c.lanes - 1) / c.lanes;
  s.staged = !c.few && vector_bytes >= 4 && c.in_flight > 0;
  s.flat = s.staged && c.flat > 0;
  s.span_begin = c.rest_matters ? 0 : c.rotary_offset;
  s.span = c.rest_matters ? c.head_dim : c.rotary_dim;
  s.span_bytes = s.span * c.bytes;
  s.adjacent = s.flat && s.pairs_inside && c.vector % 8 != 0;
  s.run = s.pairs_inside && !s.adjacent ? c.vector / 2 : c.vector;
  s.grid.threads = c.threads;
  s.grid.lanes = c.lanes;
  s.grid.rounds = s.flat ? c.flat : c.few ? c.in_flight : 1;
  s.grid.token_groups = c.token_groups;
  s.block_heads = c.threads / 32 * WarpHeads(s.grid);
  s.linear = c.packed != 0 && s.span == c.head_dim;
  s.v_rides = c.store_v && c.v_dim == c.rotary_dim && (!s.flat || c.v_dim == s.span);
  s.staged_codes = s.flat && c.store_k && c.converts && vector_bytes % 16 != 0;
  s.stage_bytes =
      s.flat ? s.block_heads * s.span_bytes : (2 * s.units_per_lane + s.rest_per_lane) * c.threads * vector_bytes;
  s.shared_bytes = (s.staged ? c.in_flight * s.stage_bytes : 0) + (s.staged_codes ? s.block_heads * s.span : 0);
  return s;
}

}  // namespace ropewalk
#endif

#endif  // ROPEWALK_BACKENDS_CUDA_KERNEL_SHAPE_H_
