// The gradient of the operation's norm and rotation: its arguments' description, and a checked call ready for a
// backend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <span>

#include "base/status.h"
#include "rope/call.h"

namespace ropewalk {

// What its description is over: the arguments of the call itself, and those of the gradient.
struct RopeBackwardArgs {
  ropewalk_rope_args rope;
  ropewalk_rope_gradients gradients;
};

// The arguments of the gradient, then those of the call. The call's q and k are inputs here, and its outputs, caches,
// slots and scales are not served.
std::span<const Arg> RopeBackwardDescription();
// How many of them are the gradient's own.
inline constexpr size_t kRopeGradients = 7;

// y = R (x / rms(x) * weight), and its gradient. `turn` is the call that turns dY back: its q and k are q_grad and
// k_grad, its outputs those of the gradient, and `inverse` is the other way round. Without a norm that is all. With
// one, its norm and its weights are those of the call, as they stand before the rotation.
struct RopeBackwardCall {
  RopeCall turn;
  // x, before the norm; null without one.
  const void* q = nullptr;
  const void* k = nullptr;
  rope_strides q_strides, k_strides;
  // Null: not wanted.
  float* q_weight_grad = nullptr;
  float* k_weight_grad = nullptr;
  float* workspace = nullptr;
  int64_t workspace_size = 0;

  bool HasWeightGrads() const { return q_weight_grad || k_weight_grad; }
};

// Checks the arguments and fills the call. A workspace is not asked for here: a backend says how large it must be.
Status LowerRopeBackward(const ropewalk_rope_args& args, const ropewalk_rope_gradients& gradients, void* stream,
                         RopeBackwardCall* call);
// That the call has a workspace of `needed` elements.
Status CheckWorkspace(const RopeBackwardCall& call, int64_t needed);

}  // namespace ropewalk
