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

// Everything a kernel is specialised for. Plain bytes without padding, so that it can be hashed and compared as such.
struct RopeCudaKey {
  RopeVariant variant;         // 16 bytes
  uint16_t head_dim = 0, rotary_dim = 0, rotary_offset = 0, v_dim = 0;
  uint16_t threads = 0;        // of a block
  uint8_t vector = 0;          // elements of one access: 1, 2, 4 or 8
  uint8_t lanes = 0;           // threads of one head: a power of two up to 32
  uint8_t in_flight = 0;       // heads a group loads before it uses the first
  uint8_t few_tokens = 0;      // layout: 0 a block for each token, 1 heads of a token spread over blocks
  uint8_t dependent_launch = 0;  // programmatic dependent launch
  uint8_t table_vector = 0;    // elements of one access to the table

  bool operator==(const RopeCudaKey&) const = default;
};
static_assert(sizeof(RopeCudaKey) == 32);

struct RopeCudaPlan {
  RopeCudaKey key;
  uint32_t grid_x = 0, grid_y = 1;  // 0: no work
  const char* why = "";             // the choice of the layout, for explain()
};

// `dependent_launch`: whether the caller and the device allow it.
Status PlanRopeCuda(const RopeCall& call, const CudaDevice& device, bool dependent_launch, RopeCudaPlan* plan);

// The text to compile: includes "ops/rope/rope.cuh" and names one kernel, extern "C" `rope_kernel`.
std::string RopeCudaSource(const RopeCudaKey& key);
// For people: "bfloat16 neox rms d128 r128 turns many v8 l8 x2 128".
std::string RopeCudaName(const RopeCudaKey& key);

}  // namespace ropewalk
