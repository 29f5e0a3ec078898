// From a call, or its gradient, to the exact SPIR-V kernel: which module, which specialisation constants, which grid,
// which arguments. Pure functions of the call and the device's properties; backends/opencl and backends/intel build,
// keep and launch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backends/spirv/kernel/args.h"
#include "base/status.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {

// The kernels of backends/spirv/kernel, in the order of cmake/spirv.cmake.
enum SpirvEntry : uint8_t { kSpirvRope = 0, kSpirvBackward = 1, kSpirvSums = 2 };

// One compilation of one of them, embedded at build time.
struct SpirvModule {
  const char* name;      // "bfloat16_v8"
  const uint8_t* bytes;  // SPIR-V 1.2 for OpenCL
  size_t size;
  uint8_t entry;   // SpirvEntry
  uint8_t dtype;   // kRopeF32, kRopeF16, kRopeBF16
  uint8_t vector;  // elements of one access
};

// All modules; none if this build had no compiler for them, and then the second says so ("" else).
std::span<const SpirvModule> RopeSpirvModules();
const char* RopeSpirvMissing();

// The kernels as OpenCL C, one text without includes, for devices that take no SPIR-V.
const char* RopeOpenClSource();

// Tensors may be larger than 4 GB.
inline constexpr const char* kRopeLevelZeroOptions = "-ze-opt-greater-than-4GB-buffer-required";

struct SpirvDevice {
  int threads = 0;          // hardware threads, each of which runs one sub-group
  int max_local = 256;      // work-items of a work-group
  int register_bytes = 64;  // 32 before Intel's Xe-HPC (PVC) and Xe2: with half the room, accesses are half as wide
  bool general = false;     // builds are dear: few kernels, whose choices are arguments
};

// A 32-bit specialisation constant.
struct SpirvConstant {
  uint32_t id;
  int32_t value;
};

// Everything a kernel is built for: plain bytes, to be hashed and compared as such.
struct RopeSpirvKey {
  uint8_t entry = kSpirvRope;
  uint8_t dtype = kRopeNoDtype;  // with `entry` and `vector`: the module
  uint8_t vector = 0;
  std::array<uint8_t, kRopeSpecCount> constants{};  // by number

  bool operator==(const RopeSpirvKey&) const = default;
};
static_assert(sizeof(RopeSpirvKey) == 15);

struct SpirvGrid {
  uint32_t groups[3] = {0, 0, 0};  // work-groups; no work if one is 0
  uint32_t local = 0;              // work-items of a group, all in the first dimension; a multiple of 16

  bool empty() const { return groups[0] == 0; }
};

// Its groups: tokens, shares of a token's heads, batch.
struct RopeSpirvPlan : SpirvGrid {
  RopeSpirvKey key;
  rope_spirv_shape shape{};
  const char* why = "";  // the choice of the layout, for explain()
};

Status PlanRopeSpirv(const RopeCall& call, const SpirvDevice& device, RopeSpirvPlan* plan);

// For this plan and that of the gradient. Lanes for a head, and units of each that stay in registers, up to `most` (0:
// they are too many for that): as few idle lanes as can be.
void ChooseSpirvLanes(int units, int most, int* lanes, int* each);
// The key and the shape, but for what the grid says.
void FillSpirvPlan(const RopeCall& call, const SpirvDevice& device, int vector, int lanes, int each,
                   RopeSpirvPlan* plan);

// "" if the plan holds what the kernel takes for granted: each head of each token and each element of a head has one
// owner, no access leaves its tensor, accesses are aligned, a work-group fits the device. Else a sentence. Takes a
// microsecond or two: asked when a kernel is made, and of every plan in builds with assertions.
std::string RopeSpirvPlanFault(const RopeCall& call, const SpirvDevice& device, const RopeSpirvPlan& plan);

// The embedded module of the key; null if this build has none.
const SpirvModule* RopeSpirvModuleOf(const RopeSpirvKey& key);
// Those that its kernel has: drivers refuse others.
std::vector<SpirvConstant> RopeSpirvConstants(const RopeSpirvKey& key);
// The same choices as macros for a build from source: "-DROPE_DTYPE=3 -DROPE_VECTOR=8 -DROPE_SPEC_NORM=1 ..".
std::string RopeOpenClDefines(const RopeSpirvKey& key);
// The name of the kernel in its module.
const char* RopeSpirvFunction(const RopeSpirvKey& key);
// For people: "bfloat16 neox rms d128 r128 turns v8 u1 l8".
std::string RopeSpirvName(const RopeSpirvKey& key);

// The arguments of a kernel in order: pointers, then a struct by value.
struct RopeSpirvArgs {
  std::array<const void*, kRopeSpirvPointers> pointers;  // of which `count` are the kernel's
  union {
    rope_spirv_params params;
    rope_backward_params backward;
    rope_sums_params sums;
  };
  uint32_t count, ours;      // from `ours` on they are memory of ours, not the caller's
  uint32_t bytes;            // of the struct
  const char* const* names;  // the caller's, of the pointers before `ours`

  const void* data() const { return &params; }
};
static_assert(int{kRopeBackwardPointers} <= int{kRopeSpirvPointers} &&
              int{kRopeSumsPointers} <= int{kRopeSpirvPointers});

// `frequencies`: on the device, the turns and after them the axes of call.frequencies; null with a table. `fault`: on
// the device, a rope_fault.
void FillRopeSpirvArgs(const RopeCall& call, const RopeSpirvPlan& plan, const void* frequencies, void* fault,
                       RopeSpirvArgs* args);

// How the gradient is cut: the variants of its two kernels, their grids, what they are launched with.
struct RopeSpirvBackwardPlan {
  RopeSpirvPlan rows;                  // work-groups in the first dimension alone: those of q, then those of k
  int32_t q_groups = 0, k_groups = 0;  // both 0: there is no work
  RopeSpirvKey sums_key;
  SpirvGrid sums;         // of the second kernel; empty: no weight's gradient is wanted
  int64_t workspace = 0;  // floats
};

// Of a call with a norm.
Status PlanRopeSpirvBackward(const RopeBackwardCall& call, const SpirvDevice& device, RopeSpirvBackwardPlan* plan);

// As RopeSpirvPlanFault: "" if the plan holds what the kernels take for granted.
std::string RopeSpirvBackwardPlanFault(const RopeBackwardCall& call, const SpirvDevice& device,
                                       const RopeSpirvBackwardPlan& plan);

// Of the first kernel and of the second; `frequencies` and `fault` as of FillRopeSpirvArgs.
void FillRopeSpirvBackwardArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, const void* frequencies,
                               void* fault, RopeSpirvArgs* args);
void FillRopeSpirvSumsArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, RopeSpirvArgs* args);

}  // namespace ropewalk
