// From a call to the exact CUDA kernel: which compile-time choices, which grid. Pure functions of the call and the
// device's properties; backends/cuda compiles, caches and launches.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "ops/rope/rope_call.h"
#include "ops/rope/rope_cuda_args.h"

namespace ropewalk {

struct CudaDevice {
  int sm_count = 0;
  int major = 0, minor = 0;  // compute capability
};

// What a multiprocessor holds at most; to ask for more is an error.
int MostCudaBlocks(const CudaDevice& device);

inline constexpr uint16_t kFlatPages = 64;

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
  uint8_t vector = 0;            // elements of one access: 1, 2, 4 or 8; flat: or a thread's share of a half, 6 or 10
  uint8_t lanes = 0;             // threads of one head, up to 32
  uint8_t in_flight = 0;         // heads a group loads before it uses the first; few tokens: all of its heads
  uint8_t few_tokens = 0;        // layout: 0 a block for each token, 1 heads of a token spread over blocks
  uint8_t dependent_launch = 0;  // programmatic dependent launch: 1 the next may start at the end of this one, 2 early
  uint8_t table_vector = 0;      // elements of one access to the table
  uint8_t batched = 0;           // more than one batch entry
  uint8_t unit_scaling = 0;      // attention_scaling is 1
  float eps = 0.0f;              // 0 without a norm
  uint8_t dense_indices = 0;     // positions, offsets and slots have no gaps between tokens
  uint8_t flat = 0;              // many tokens: a warp's heads are fetched and written side by side, 16 bytes a lane
  uint8_t packed = 0;            // k lies behind q in the same row: 1; 2: and v behind k (few tokens)
  uint8_t min_blocks = 0;        // of a multiprocessor, for which registers are limited; 0: the compiler's choice
  uint8_t scale_pointers = 0;    // a scale of an fp8 cache lies on the device
  uint8_t unused[3] = {};

  bool operator==(const RopeCudaKey&) const = default;
};
static_assert(sizeof(RopeCudaKey) == 80);

struct RopeCudaPlan {
  RopeCudaKey key;
  uint32_t grid_x = 0, grid_y = 1;  // 0: no work
  const char* why = "";             // the choice of the layout, for explain()
};

enum class RopeCudaLayout : uint8_t { kAny, kFew, kMany };

struct RopeCudaOptions {
  bool dependent_launch = false;                 // programmatic dependent launch, where the device has it
  RopeCudaLayout layout = RopeCudaLayout::kAny;  // else as force_backend says
};

Status PlanRopeCuda(const RopeCall& call, const CudaDevice& device, RopeCudaOptions options, RopeCudaPlan* plan);

// The text to compile: includes "ops/rope/rope.cuh" and names one kernel, extern "C" `rope_kernel`.
std::string RopeCudaSource(const RopeCudaKey& key);
// For people: "bfloat16 neox rms d128 r128 turns many v8 l8 x2 128".
std::string RopeCudaName(const RopeCudaKey& key);

}  // namespace ropewalk
