// How the gradient is cut for the SPIR-V kernels. backends/opencl and backends/intel launch them.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>

#include "backends/spirv/kernel/index.h"
#include "backends/spirv/plan.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

// Bytes of an access. A lane has one unit of two vectors, with x, dY, cosines, sines and two floats of a sum for each
// of its elements: with registers of 32 bytes there is room for half.
int AccessBytes(uint8_t dtype, int register_bytes) { return register_bytes >= 64 || dtype == kRopeF32 ? 16 : 8; }
// Heads of tokens that a set of sums should have at least, so that writing it is little beside reading them.
constexpr int64_t kLeastHeads = 16;

int ChooseBackwardVector(const RopeBackwardCall& call, const SpirvDevice& device) {
  const int bytes = RopeDtypeBytes(call.turn.variant.dtype);
  int vector = ChooseVector(call.turn, AccessBytes(call.turn.variant.dtype, device.register_bytes));
  const auto align = [&](const void* x, const rope_strides& s) {
    if (x) vector = Alignment(vector, x, bytes, {s.batch, s.token, s.head});
  };
  align(call.q, call.q_strides);
  align(call.k, call.k_strides);
  return vector == 2 ? 1 : vector;  // there is no module of 2
}

}  // namespace

Status PlanRopeSpirvBackward(const RopeBackwardCall& call, const SpirvDevice& device, RopeSpirvBackwardPlan* plan) {
  *plan = {};
  RopeCall turn = call.turn;
  turn.variant.out_of_place = 1;  // every element is written
  const rope_params& p = turn.params;
  const int64_t rows = p.batch * p.tokens, k_heads = turn.tensors.k ? p.k_heads : 0, heads = p.q_heads + k_heads;
  if (rows > INT32_MAX) {
    return Status::Invalid(Text("rope: q_grad must have fewer than 2^31 tokens on a GPU, but has ", rows));
  }
  const int weights = (call.q_weight_grad ? 1 : 0) + (call.k_weight_grad ? 1 : 0);
  const auto most = static_cast<int64_t>(std::clamp(device.max_local / ROPE_SUB_GROUP, 1, 8));  // sub-groups
  RopeSpirvPlan& of_rows = plan->rows;
  rope_spirv_shape& s = of_rows.shape;
  if (rows > 0 && heads > 0) {
    const int vector = ChooseBackwardVector(call, device);
    int lanes = 0, each = 0;
    ChooseSpirvLanes(p.rotary_dim / (2 * vector), 1, &lanes, &each);
    FillSpirvPlan(turn, device, vector, lanes, each, &of_rows);
    of_rows.key.entry = kSpirvBackward;
    s.choices[kRopeSpecSums] = weights > 0;
    if (!device.general) of_rows.key.constants[kRopeSpecSums] = weights > 0;

    // As many sub-groups as run at once, dealt to q and k by their heads; each has a token at least.
    const int64_t sets = weights == 0 ? rows * heads : rows * heads / kLeastHeads;
    const int64_t wanted = std::clamp<int64_t>(sets / s.heads_at_once, 1, std::max(device.threads, 1));
    const int64_t together = std::min({most, rows, wanted}), groups = (wanted + together - 1) / together;
    const int64_t at_most = (rows - 1) / together + 1;
    const auto share = [&](int64_t own) {
      if (own == 0) return 0;
      return static_cast<int32_t>(std::clamp<int64_t>((groups * own + heads / 2) / heads, 1, at_most));
    };
    plan->q_groups = share(p.q_heads);
    plan->k_groups = share(k_heads);
    of_rows.local = static_cast<uint32_t>(together * ROPE_SUB_GROUP);
    of_rows.groups[0] = static_cast<uint32_t>(plan->q_groups + plan->k_groups);
    of_rows.groups[1] = of_rows.groups[2] = 1;
    of_rows.why = "a sub-group takes every so many tokens";
    s.sub_groups = static_cast<int>(together);
    s.step = s.heads_at_once;
  }
  if (weights > 0) {
    plan->workspace =
        int64_t{of_rows.groups[0]} * rope_sums_of_group(s.sub_groups, s.heads_at_once) * rope_sums_size(p.head_dim);
    plan->sums_key.entry = kSpirvSums;
    plan->sums_key.dtype = kRopeF32;
    plan->sums_key.vector = 1;
    plan->sums.local = static_cast<uint32_t>(most * ROPE_SUMS_ELEMENTS);
    plan->sums.groups[0] = static_cast<uint32_t>((p.head_dim + ROPE_SUMS_ELEMENTS - 1) / ROPE_SUMS_ELEMENTS);
    plan->sums.groups[1] = static_cast<uint32_t>(weights);
    plan->sums.groups[2] = 1;
  }
#ifndef NDEBUG
  if (const std::string fault = RopeSpirvBackwardPlanFault(call, device, *plan); !fault.empty())
    return Status::Internal(Text("rope: a plan of the gradient for SPIR-V is wrong: ", fault));
#endif
  return {};
}

void FillRopeSpirvBackwardArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, const void* frequencies,
                               void* fault, RopeSpirvArgs* args) {
  static constexpr const char* kNames[] = {"q_grad",     "k_grad", "positions", "offsets",  "cos",
                                           "sin",        "axes",   "q_weight",  "k_weight", "q_grad_out",
                                           "k_grad_out", "q",      "k",         "workspace"};
  static_assert(std::size(kNames) == kRopeBackwardTurns);
  FillRopeSpirvArgs(call.turn, plan.rows, frequencies, fault, args);
  args->pointers[kRopeBackwardQ] = call.q;
  args->pointers[kRopeBackwardK] = call.k;
  args->pointers[kRopeBackwardSums] = call.workspace;
  args->pointers[kRopeBackwardTurns] = frequencies;
  args->pointers[kRopeBackwardFault] = fault;
  args->backward = {call.turn.params, plan.rows.shape, call.q_strides, call.k_strides, plan.q_groups, plan.k_groups};
  args->count = kRopeBackwardPointers;
  args->ours = kRopeBackwardTurns;
  args->bytes = sizeof(args->backward);
  args->names = kNames;
}

void FillRopeSpirvSumsArgs(const RopeBackwardCall& call, const RopeSpirvBackwardPlan& plan, RopeSpirvArgs* args) {
  static constexpr const char* kNames[] = {"workspace", "q_weight_grad", "k_weight_grad"};
  static_assert(std::size(kNames) == kRopeSumsPointers);
  const rope_spirv_shape& s = plan.rows.shape;
  const int head_dim = call.turn.params.head_dim;
  args->pointers[0] = call.workspace;
  args->pointers[1] = call.q_weight_grad;
  args->pointers[2] = call.k_weight_grad;
  args->sums = {head_dim, rope_sums_of_group(s.sub_groups, s.heads_at_once) * rope_sums_size(head_dim), plan.q_groups,
                plan.k_groups};
  args->count = args->ours = kRopeSumsPointers;
  args->bytes = sizeof(args->sums);
  args->names = kNames;
}

}  // namespace ropewalk
