// What becomes of one token on the CPU: its positions, its slot, and whether it is rotated, left out or poisoned.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/rope/rope_call.h"

namespace ropewalk {

inline int64_t LoadInt(const void* data, uint8_t dtype, int64_t index) {
  return dtype == kRopeI32 ? static_cast<const int32_t*>(data)[index] : static_cast<const int64_t*>(data)[index];
}

struct RowPlan {
  int64_t batch, token;
  int64_t slot = -1;      // where to store; negative: nowhere
  bool left_out = false;  // padding: a negative slot, and a position outside the table
  int fault = kRopeFaultNone;
  int64_t fault_value = 0;
  int fault_axis = 0;
};

// The position of a token on one axis, the offset added; wraps.
inline int64_t PositionOf(const RopeCall& call, int64_t batch, int64_t token, int axis) {
  const rope_params& p = call.params;
  uint64_t position = static_cast<uint64_t>(token);
  if (call.tensors.positions) {
    position =
        static_cast<uint64_t>(LoadInt(call.tensors.positions, call.variant.positions_dtype,
                                      axis * p.positions_axis + batch * p.positions_batch + token * p.positions_token));
  }
  if (call.tensors.offsets) {
    position += static_cast<uint64_t>(
        LoadInt(call.tensors.offsets, call.variant.offsets_dtype, batch * p.offsets_batch + token * p.offsets_token));
  }
  return static_cast<int64_t>(position);
}

inline const int32_t* AxesOf(const RopeCall& call) {
  if (!call.variant.axes) return nullptr;
  return call.tensors.axes ? call.tensors.axes : call.frequencies->axes.data();
}

inline RowPlan PlanRow(const RopeCall& call, int64_t row) {
  const rope_params& p = call.params;
  const int64_t batch = row < p.tokens ? 0 : row / p.tokens;  // a division costs as much as half a head
  RowPlan plan{.batch = batch, .token = row - batch * p.tokens};
  bool padding = false;
  int64_t slot = -1;
  if (call.tensors.slots) {
    slot =
        LoadInt(call.tensors.slots, call.variant.slots_dtype, plan.batch * p.slots_batch + plan.token * p.slots_token);
    padding = slot < 0;
  }
  if (const int32_t* axes = call.tensors.axes; axes && call.variant.axes) {
    for (int i = 0; i < p.rotary_dim / 2; ++i) {
      if (axes[i] >= 0 && axes[i] < p.axes) continue;
      plan.fault = kRopeFaultAxis;
      plan.fault_value = axes[i];
      plan.fault_axis = i;
      return plan;
    }
  }
  if (call.variant.table_dtype != kRopeNoDtype) {
    // Only the rows that pairs take: another may hold anything.
    const int32_t* axes = AxesOf(call);
    for (int i = 0; i < (axes ? p.rotary_dim / 2 : 1); ++i) {
      const int axis = axes ? axes[i] : 0;
      if (i > 0 && axis == axes[i - 1]) continue;
      const int64_t position = PositionOf(call, plan.batch, plan.token, axis);
      if (position >= 0 && position < p.rows) continue;
      if (padding) {
        plan.left_out = true;
      } else {
        plan.fault = kRopeFaultPosition;
        plan.fault_value = position;
        plan.fault_axis = axis;
      }
      return plan;
    }
  }
  if (slot >= p.slots) {
    plan.fault = kRopeFaultSlot;
    plan.fault_value = slot;
  } else {
    plan.slot = slot;
  }
  return plan;
}

}  // namespace ropewalk
