// From a call, or its gradient, to the exact CUDA kernel: which compile-time choices, which grid. Pure functions of the
// call and the device's properties; backends/cuda compiles, caches and launches.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "backends/cuda/kernel/args.h"
#include "backends/cuda/kernel/shape.h"
#include "base/status.h"
#include "rope/access.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {

struct RopeCudaTuned;

struct CudaDevice {
  int sm_count = 0;
  int major = 0, minor = 0;              // compute capability
  bool measured = false;                 // the table of shapes was searched on such a device
  const RopeCudaTuned* tuned = nullptr;  // what `ropewalk tune` found on it; null: nothing
};

// What a multiprocessor holds at most; to ask for more is an error.
int MostCudaBlocks(const CudaDevice& device);
inline constexpr int kMostCudaWarps = 64;
// Of each of its four parts, whose warps take their registers there; a thread takes a multiple of the step.
inline constexpr int kCudaPartRegisters = 16384, kCudaRegisterStep = 8;
// Its shared memory, of which a block takes so much more than it asks for.
int CudaSharedBytes(const CudaDevice& device);
inline constexpr int kCudaBlockBytes = 1024;

inline constexpr uint16_t kFlatPages = 64;

// The operation; its gradient, without and with sums for those of the weights; what adds these up
// (kernel/backward.cuh, sums.cuh).
enum : uint8_t { kCudaForward = 0, kCudaBackward = 1, kCudaBackwardAndSums = 2, kCudaSums = 3 };

// Everything a kernel is specialised for. Plain bytes without padding, so that it can be hashed and compared as such.
// Heads and strides are part of it where a model fixes them, that is where the heads of a token lie side by side: a
// kernel then reads little but its pointers, which at few tokens is a third of its time (docs/cuda.md). Otherwise they
// are 0 here and come with the params, so that a stride that changes with the sequence compiles nothing.
struct RopeCudaKey {
  RopeVariant variant;  // 16 bytes
  uint16_t head_dim = 0, rotary_dim = 0, rotary_offset = 0, v_dim = 0;
  uint16_t threads = 0;               // of a block
  uint16_t q_heads = 0, k_heads = 0;  // q_heads 0: with the params
  uint16_t page_shift = 0;            // of the caches: 1 + log2(page_size), kFlatPages for one page, 0: any page size
  int32_t q_token = 0, k_token = 0;   // strides in elements; 0: all strides of q, k and the outputs with the params
  int32_t v_token = 0;                // the same for v, whose heads are then dense
  int32_t table_row = 0;              // of cos and of sin; 0: their strides with the params
  int32_t cache_token = 0, cache_head = 0;  // of both caches; a head of 0: with the params
  int32_t cache_page = 0;
  uint8_t vector = 0;            // elements of one access: 1, 2, 4 or 8; in flat also 6 or 10, a lane's part of a half
  uint8_t lanes = 0;             // threads of one head, up to 32
  uint8_t in_flight = 0;         // heads that a group loads ahead; in few, all of its heads
  uint8_t few_tokens = 0;        // the layout: 0 staged or flat, 1 few
  uint8_t dependent_launch = 0;  // programmatic dependent launch: as RopeCudaShape::start, 0 none
  uint8_t table_vector = 0;      // elements of one access to the table
  uint8_t batched = 0;           // more than one batch entry
  uint8_t unit_scaling = 0;      // attention_scaling is 1
  float eps = 0.0f;              // 0 without a norm
  uint8_t dense_indices = 0;     // positions, offsets and slots have no gaps between tokens
  uint8_t flat = 0;              // 0: staged; else flat, and this is the heads of a group in a turn
  uint8_t packed = 0;            // 1: k lies behind q in the same row; 2: and v behind k
  uint8_t min_blocks = 0;        // at least so many on a multiprocessor, which limits registers; 0: no limit
  uint8_t scale_pointers = 0;    // a scale of an fp8 cache lies on the device
  // Facts of the grid that the kernel relies on; CheckRopeCudaPlan proves them.
  uint8_t full = 0;                 // few tokens: every group has a head
  uint8_t alike = 0;                // few tokens: the heads of a warp are all of one tensor
  uint8_t backward = kCudaForward;  // which kernel
  uint16_t token_groups = 0;        // groups that share the heads of a token (backends/cuda/kernel/shape.h)
  uint8_t at_once = 0;              // min_blocks is RopeCudaPlan::at_once, and may make it spill a little
  uint8_t unused_too = 0;

  bool operator==(const RopeCudaKey&) const = default;
};
static_assert(sizeof(RopeCudaKey) == 84);

// Blocks of the variant that a multiprocessor holds if each thread takes so many registers, as cuda_occupancy.h has it.
int ResidentBlocks(const RopeCudaKey& key, const CudaDevice& device, int registers);

inline rope_choices ChoicesOf(const RopeCudaKey& key) {
  const RopeVariant& v = key.variant;
  return {RopeDtypeBytes(v.dtype),
          key.head_dim,
          key.rotary_dim,
          key.rotary_offset,
          key.v_dim,
          key.vector,
          key.lanes,
          key.in_flight,
          key.flat,
          key.threads,
          key.token_groups,
          key.packed,
          key.few_tokens != 0,
          v.pairing != 0,
          v.norm || v.out_of_place || v.store_k,
          v.store_k != 0,
          v.store_v != 0,
          v.cache_dtype != v.dtype};
}

// The free choices of a plan: the layout, and how the work is cut. The result is right with any of them. Which is fast,
// tables of measured shapes and a model say (shapes.h).
struct RopeCudaShape {
  uint8_t few = 0;          // the layout: 0 staged or flat, 1 few
  uint8_t vector = 0;       // elements of one access; 0: as many as fit; in flat also 6 or 10, a lane's part of a half
  uint8_t in_flight = 1;    // few: heads that a group takes at once; else: stages on their way
  uint8_t flat = 0;         // 0: staged; else flat, and this is the heads of a group in a turn
  uint8_t cut = 1;          // few: roughly the warps of a block for a token; else: turns for its heads
  uint8_t warp_tokens = 1;  // staged: tokens that share a warp
  uint8_t tokens = 1;       // of a block
  uint8_t resident =
      0;  // staged, flat: warps that a multiprocessor shall hold, which limits registers; 0: the compiler's choice
  uint8_t share = 1;  // units of a head that a thread takes at least, where they divide its units: fewer threads a head
  // When the next kernel of the stream may start: 1 at the end of this one, 2 when the position has arrived, 3 when all
  // loads are issued. 0: as RopeCudaStart says.
  uint8_t start = 0;

  bool operator==(const RopeCudaShape&) const = default;
  // In this order, for people, searches and files.
  std::array<int, 10> numbers() const {
    return {few, vector, in_flight, flat, cut, warp_tokens, tokens, resident, share, start};
  }
  static RopeCudaShape Of(const std::array<uint8_t, 10>& n) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  }
};

// When the next kernel may start by a shape for so many rows. Without a choice: early if all blocks of this one run at
// once, or if there are so many that the last ones leave room; in between it would crowd them.
inline uint8_t RopeCudaStart(const RopeCudaShape& shape, int64_t rows, bool table) {
  if (shape.start >= 1 && shape.start <= 3) return shape.start;
  return !shape.few && rows < 3072 ? 1 : table ? 3 : 2;
}

// The facts of a call that its shape depends on. Numbers are logarithms to base 2.
struct RopeCudaFeatures {
  uint8_t norm = 0, table = 0, store = 0, regular = 0;  // StoreKind; a power of two of lanes
  float lanes = 0;                                      // of a head, with the widest accesses
  float bytes = 0;                                      // of q and k for each multiprocessor
  float turns = 0;                                      // of a warp for all heads of a token
  float tokens = 0;                                     // for each multiprocessor, scaled to those of an H200
};

// Shapes that `ropewalk tune` found on a device.
struct RopeCudaTuned {
  struct Entry {
    RopeCudaFeatures features;
    RopeCudaShape shape;
  };
  std::vector<Entry> entries;
};

// Where a shape comes from: the caller; rules; a search on this device; a search on such a device; the nearest call of
// that search, or rules where it has none.
enum class RopeCudaOrigin : uint8_t { kGiven, kRules, kTunedHere, kTable, kModel };
inline const char* OriginName(RopeCudaOrigin origin) {
  constexpr const char* kNames[] = {"given", "rules", "tuned here", "table", "model"};
  return kNames[static_cast<size_t>(origin)];
}

struct RopeCudaPlan {
  RopeCudaKey key;
  uint32_t grid_x = 0, grid_y = 1;  // 0: there is no work
  const char* why = "";             // the choice of the layout, for explain()
  RopeCudaOrigin origin = RopeCudaOrigin::kGiven;
  RopeCudaShape shape;  // what it was laid out by
  // Many tokens: all blocks run at once if a multiprocessor holds so many, which it does not if the kernel takes
  // registers from `crowded_from` on. With up to `crowded_to`, the same variant with fewer is worth a compilation: by
  // AtOnceKey. 0: no such case.
  int at_once = 0, crowded_from = 0, crowded_to = 0;
};
// The plan's variant with registers limited for plan.at_once. What it may spill and yet be faster than a second round:
// 14.7 us with 8 bytes, 15.5 with none (16/4 heads of 160 at 4,096 tokens, H200).
RopeCudaKey AtOnceKey(const RopeCudaPlan& plan);
inline constexpr int kAtOnceSpill = 16;

enum class RopeCudaLayout : uint8_t { kAny, kFew, kMany };

struct RopeCudaOptions {
  bool dependent_launch = false;                 // programmatic dependent launch, where the device has it
  RopeCudaLayout layout = RopeCudaLayout::kAny;  // else as force_backend says
  const RopeCudaShape* shape = nullptr;          // to be tried, instead of the one that is chosen
  bool rules = false;                            // take a shape by rules, not by tables: bundles hold few variants
};

// Sets the layout and the grid of a plan from a shape, and no more of the plan. A call with little work gets fewer
// warps, stages and tokens than the shape says.
void LayOutRopeCuda(const RopeCall& call, const RopeCudaShape& shape, RopeCudaPlan* plan);

// Refuses a shape that the caller gave and that does not fit the call.
Status PlanRopeCuda(const RopeCall& call, const CudaDevice& device, RopeCudaOptions options, RopeCudaPlan* plan);

// Elements of one access to the table, for vectors of so many elements of a head.
uint8_t TableVector(const RopeCall& call, int vector, bool flat);

// Proves a plan of a call: each head of q, k and v of each token has exactly one owner, no access leaves its tensor,
// vectors are aligned, block and shared memory fit, and what the key says of strides, addresses and the grid is so.
Status CheckRopeCudaPlan(const RopeCall& call, const CudaDevice& device, const RopeCudaPlan& plan);

// How the gradient is cut: the variants of its two kernels and their grids.
struct RopeCudaBackwardPlan {
  RopeCudaKey key, sums_key;
  int32_t q_blocks = 0, k_blocks = 0;  // both 0: there is no work
  uint32_t sums_blocks = 0;            // of the second kernel; 0: no weight's gradient is wanted
  int64_t workspace = 0;               // floats
};

// Of a call with a norm.
Status PlanRopeCudaBackward(const RopeBackwardCall& call, const CudaDevice& device, RopeCudaBackwardPlan* plan);

// The text to compile: includes "backends/cuda/kernel/rope.cuh", backward.cuh or sums.cuh, and names one kernel, extern
// "C".
std::string RopeCudaSource(const RopeCudaKey& key);
// What that is called: `rope_kernel`, of the gradient `rope_backward_kernel`.
const char* RopeCudaFunction(const RopeCudaKey& key);
// For people: "bfloat16 neox rms d128 r128 turns many v8 l8 x2 128".
std::string RopeCudaName(const RopeCudaKey& key);

}  // namespace ropewalk
