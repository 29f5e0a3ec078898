// What becomes of one token on the CPU: its positions, its slot, and whether it is rotated, left out or poisoned.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "rope/call.h"

namespace ropewalk {

// Read once, so that what was checked is what is used, whatever another thread writes there.
template <class T>
T LoadOnce(const T* value) {
  return __atomic_load_n(value, __ATOMIC_RELAXED);
}
inline int64_t LoadInt(const void* data, uint8_t dtype, int64_t index) {
  return dtype == kRopeI32 ? LoadOnce(static_cast<const int32_t*>(data) + index)
                           : LoadOnce(static_cast<const int64_t*>(data) + index);
}

struct RowPlan {
  int64_t batch, token;
  int64_t position = 0;   // where pairs have no axes
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

// `positions`: room for one of each pair, filled where pairs have axes.
inline RowPlan PlanRow(const RopeCall& call, int64_t row, int64_t* positions) {
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
  const bool table = call.variant.table_dtype != kRopeNoDtype;
  // False if the row is not to be rotated.
  const auto take = [&](int axis, int64_t* position) {
    *position = PositionOf(call, plan.batch, plan.token, axis);
    if (!table || (*position >= 0 && *position < p.rows)) return true;
    if (padding) {
      plan.left_out = true;
    } else {
      plan.fault = kRopeFaultPosition;
      plan.fault_value = *position;
      plan.fault_axis = axis;
    }
    return false;
  };
  if (call.variant.axes) {
    const int pairs = p.rotary_dim / 2;
    for (int i = 0; i < pairs; ++i) {
      const int axis =
          call.tensors.axes ? LoadOnce(call.tensors.axes + i) : call.frequencies->axes[static_cast<size_t>(i)];
      positions[i] = axis;
      if (axis >= 0 && axis < p.axes) continue;
      plan.fault = kRopeFaultAxis;
      plan.fault_value = axis;
      plan.fault_axis = i;
      return plan;
    }
    // Look only at the positions that some pair uses: the others may hold anything.
    for (int i = 0, last = -1; i < pairs; ++i) {
      const int axis = static_cast<int>(positions[i]);
      if (axis == last) {
        positions[i] = positions[i - 1];
      } else if (!take(axis, &positions[i])) {
        return plan;
      }
      last = axis;
    }
  } else if (!take(0, &plan.position)) {
    return plan;
  }
  if (slot >= p.slots) {
    plan.fault = kRopeFaultSlot;
    plan.fault_value = slot;
  } else {
    plan.slot = slot;
  }
  return plan;
}

// The first row of a call that meets a fault.
class FirstFault {
 public:
  __attribute__((noinline)) void Report(int64_t row, const RowPlan& plan) {
    if (row >= row_.load(std::memory_order_relaxed)) return;
    const std::lock_guard lock(mutex_);
    if (row >= row_.load(std::memory_order_relaxed)) return;
    plan_ = plan;
    row_.store(row, std::memory_order_relaxed);
  }
  // Once all rows are done. INT64_MAX: none.
  int64_t row() const { return row_.load(std::memory_order_relaxed); }
  const RowPlan& plan() const { return plan_; }

 private:
  std::atomic<int64_t> row_{INT64_MAX};
  std::mutex mutex_;
  RowPlan plan_ = {};
};

}  // namespace ropewalk
