// What a shape of the CUDA kernel would cost a call: a model, learned from searches (bench/cuda_table.py).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "backends/cuda/plan.h"

namespace ropewalk {

// What the model knows of a plan, in the order of its weights. log: to base 2; of a multiprocessor: on average.
struct CostInputs {
  float few = 0;           // the layout
  float access = 0;        // log: bytes of one
  float in_flight = 0;     // heads or stages
  float flat = 0;          // rounds
  float turns = 0;         // log: of a group
  float warp_tokens = 0;   // log
  float block_tokens = 0;  // log
  float limited = 0;       // whether registers are limited
  float resident = 0;      // the warps that they are limited for
  float norm = 0;          // and the next four: whether the call has it
  float table = 0;
  float store = 0;
  float fp8 = 0;
  float k_only = 0;
  float bytes = 0;   // log: of q and k for a multiprocessor
  float tokens = 0;  // log: as many as an H200 would have
  float heads = 0;   // log: of a token
  float lanes = 0;   // log: of a head
  float groups = 0;  // of a warp
  float block_warps = 0;
  float all_warps = 0;   // log: of a multiprocessor, one after the other
  float blocks = 0;      // log: likewise
  float last_block = 0;  // how full the last row of blocks is, where a multiprocessor has one at a time
  float waves = 0;       // log: of as many blocks as there is room for
  float last_wave = 0;   // how full the last one is
  float busy = 0;        // the part of the places for heads that have one
  float used = 0;        // the part of a warp that works
  float rest = 0;        // vectors of a thread that are not rotated
  float units = 0;       // pairs of vectors of a thread
  float head = 0;        // log: bytes that are touched of one
  float part = 0;        // of a head that is rotated
  float k_part = 0;      // of the heads that are k's
  float shared = 0;      // log: bytes of shared memory of a multiprocessor
  float ended = 0;       // whether the next kernel may start when this one ends; 0 and the next 0: in between
  float issued = 0;      // whether it may when the loads are issued
};
inline constexpr size_t kCostInputs = sizeof(CostInputs) / sizeof(float);

CostInputs CostInputsOf(const RopeCall& call, const CudaDevice& device, const RopeCudaShape& shape);
// With another RopeCudaShape::start, 1 to 3.
void SetCostStart(int start, CostInputs* inputs);

// The logarithm of the time, up to a summand that all shapes of a call have in common.
float RopeCudaCost(const CostInputs& inputs);

}  // namespace ropewalk
