// SPDX-License-Identifier: Apache-2.0
#include "rope/backward.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>

#include "base/text.h"

namespace ropewalk {
namespace {

#define FIELD(name) #name, Kind::kTensor, offsetof(RopeBackwardArgs, gradients.name)

// clang-format off
constexpr Arg kGradients[] = {
    {FIELD(q_grad), "the gradient of the rotated q; becomes that of q, unless q_grad_out is given", Intent::kInOut,
     kFloats, nullptr, {Dim::kBatch, Dim::kTokens, Dim::kQHeads, Dim::kHeadDim},
     kRequired | kUnitStride | kOptionalBatch},
    {FIELD(k_grad), "that of the rotated k; becomes that of k, unless k_grad_out is given", Intent::kInOut, kFloats,
     "q_grad", {Dim::kBatch, Dim::kTokens, Dim::kKHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(q_grad_out), "written instead of q_grad", Intent::kOut, kFloats, "q_grad",
     {Dim::kBatch, Dim::kTokens, Dim::kQHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(k_grad_out), "written instead of k_grad", Intent::kOut, kFloats, "q_grad",
     {Dim::kBatch, Dim::kTokens, Dim::kKHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(q_weight_grad), "the gradient of q_weight. None: it is not wanted", Intent::kOut, kF32, nullptr,
     {Dim::kHeadDim}, kUnitStride},
    {FIELD(k_weight_grad), "the gradient of k_weight. None: it is not wanted", Intent::kOut, kF32, nullptr,
     {Dim::kHeadDim}, kUnitStride},
    {FIELD(workspace), "room for sums, as many as ropewalk_rope_backward_workspace says", Intent::kOut, kF32, nullptr,
     {Dim::kWorkspace}, kUnitStride},
};
// clang-format on
static_assert(std::size(kGradients) == kRopeGradients);

// Arguments of the call without a gradient.
constexpr std::string_view kWithoutGradient[] = {"q_out",   "k_out", "v",       "k_cache",
                                                 "v_cache", "slots", "k_scale", "v_scale"};

template <class... Parts>
Status Invalid(const Parts&... parts) {
  return Status::Invalid(Text("rope: ", parts...));
}

constexpr size_t kMostArgs = 48;

struct Table {
  std::array<Arg, kMostArgs> args = {};
  size_t count = 0;
};

Table MakeTable() {
  Table table;
  for (const Arg& arg : kGradients) table.args[table.count++] = arg;
  for (Arg arg : RopeDescription()) {
    if (table.count == kMostArgs) break;  // a test compares the sizes
    arg.offset += offsetof(RopeBackwardArgs, rope);
    if (std::string_view(arg.name) == "q" || std::string_view(arg.name) == "k") {
      arg.intent = Intent::kIn;
      arg.like = "q_grad";
      arg.flags &= ~static_cast<uint32_t>(kRequired);
    }
    table.args[table.count++] = arg;
  }
  return table;
}

const Arg* Find(std::string_view name) {
  const auto table = RopeBackwardDescription();
  return &*std::ranges::find(table, name, [](const Arg& arg) { return std::string_view(arg.name); });
}

// Which arguments go together; LowerRope knows the rules of what the call itself has.
Status CheckCombination(const RopeBackwardArgs& a) {
  const ropewalk_rope_args& rope = a.rope;
  const ropewalk_rope_gradients& g = a.gradients;
  for (const std::string_view name : kWithoutGradient) {
    if (TensorOf(*Find(name), &a)) {
      return Invalid(name, " is given, but the gradient is of the norm and the rotation alone: leave it out");
    }
  }
  if (rope.k_store_only) return Invalid("k_store_only is 1, but the gradient is of the norm and the rotation alone");
  const bool norm = rope.norm == ROPEWALK_NORM_RMS || rope.q_weight;
  const bool both[] = {true, g.k_grad != nullptr};
  const char* const names[] = {"q", "k"};
  const DLTensor* const inputs[] = {rope.q, rope.k};
  const DLTensor* const outs[] = {g.q_grad_out, g.k_grad_out};
  const DLTensor* const weights[] = {rope.q_weight, rope.k_weight};
  const DLTensor* const weight_grads[] = {g.q_weight_grad, g.k_weight_grad};
  for (size_t i = 0; i < 2; ++i) {
    if (norm && both[i] && !inputs[i]) {
      return Invalid(names[i], " is missing: the gradient of the norm needs it as it was before");
    }
    if (both[i]) continue;
    const char* given = inputs[i]         ? ""
                        : outs[i]         ? "_grad_out"
                        : weights[i]      ? "_weight"
                        : weight_grads[i] ? "_weight_grad"
                                          : nullptr;
    if (given) return Invalid(names[i], given, " is given, but ", names[i], "_grad is missing");
  }
  for (size_t i = 0; i < 2; ++i) {
    if (weight_grads[i] && !weights[i]) {
      return Invalid(names[i], "_weight_grad is given, but ", names[i], "_weight is missing");
    }
  }
  return {};
}

}  // namespace

std::span<const Arg> RopeBackwardDescription() {
  static const Table table = MakeTable();
  return {table.args.data(), table.count};
}

Status LowerRopeBackward(const ropewalk_rope_args& args, const ropewalk_rope_gradients& gradients, void* stream,
                         RopeBackwardCall* call) {
  const RopeBackwardArgs a{args, gradients};
  const bool mapped = args.axes || (args.frequencies && !args.frequencies->axes.empty());
  Sizes sizes;
  std::array<Strides, kMostArgs> strides;  // of absent tensors undefined: read only what is there
  const std::span<const Arg> table = RopeBackwardDescription();
  ROPEWALK_TRY(Check(table, &a, mapped, &sizes, strides));
  ROPEWALK_TRY(CheckCombination(a));
  const bool norm = args.norm == ROPEWALK_NORM_RMS || args.q_weight;

  // Without a norm q and k are not read, and may be whatever they are.
  RopeBackwardArgs read = a;
  if (!norm) read.rope.q = read.rope.k = nullptr;
  constexpr Replaced kReplaced[] = {{"q_grad", "q_grad_out"}, {"k_grad", "k_grad_out"}};
  ROPEWALK_TRY(CheckOverlap(table, &read, kReplaced));

  ropewalk_rope_args turn = args;
  turn.q = gradients.q_grad;
  turn.k = gradients.k_grad;
  turn.q_out = gradients.q_grad_out;
  turn.k_out = gradients.k_grad_out;
  turn.inverse = !args.inverse;
  ROPEWALK_TRY(LowerRope(turn, stream, &call->turn));

  const auto strides_of = [&](const char* name, const DLTensor* tensor, Dim heads) -> rope_strides {
    if (!tensor) return {};
    const Strides& s = strides[static_cast<size_t>(Find(name) - table.data())];
    return {s[Dim::kBatch], s[Dim::kTokens], s[heads]};
  };
  const auto data = [](const DLTensor* tensor) { return tensor ? static_cast<float*>(DataOf(*tensor)) : nullptr; };
  call->q = norm ? data(args.q) : nullptr;
  call->k = norm ? data(args.k) : nullptr;
  call->q_strides = strides_of("q", args.q, Dim::kQHeads);
  call->k_strides = strides_of("k", args.k, Dim::kKHeads);
  call->q_weight_grad = data(gradients.q_weight_grad);
  call->k_weight_grad = data(gradients.k_weight_grad);
  call->workspace = data(gradients.workspace);
  call->workspace_size = gradients.workspace ? sizes[Dim::kWorkspace] : 0;

  return {};
}

Status CheckWorkspace(const RopeBackwardCall& call, int64_t needed) {
  if (needed == 0 || call.workspace_size >= needed) return {};
  if (!call.workspace) {
    return Invalid("workspace is missing: the gradient of the weights needs one of ", needed, " elements");
  }
  return Invalid("workspace must have at least ", needed, " elements, but has ", call.workspace_size);
}

}  // namespace ropewalk
