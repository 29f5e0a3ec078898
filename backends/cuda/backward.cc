// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/backward.h"

#include <algorithm>

#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Blocks that a multiprocessor holds where a thread's registers allow it: so many bytes are on their way from memory.
constexpr int kBlocksAtOnce = 3;
constexpr int kMostElements = 16;  // of a thread, for that

}  // namespace

Status PlanRopeCudaBackward(const RopeBackwardCall& call, const CudaDevice& device, RopeCudaBackwardPlan* plan) {
  *plan = {};
  RopeCall turn = call.turn;
  turn.variant.out_of_place = 1;  // every element is written
  const rope_params& p = turn.params;
  const RopeVariant& v = turn.variant;
  const int64_t rows = p.batch * p.tokens, heads = int64_t{p.q_heads} + p.k_heads;
  if (rows > INT32_MAX)
    return Status::Invalid(Text("rope: q_grad must have fewer than 2^31 tokens on a GPU, but has ", rows));

  RopeCudaKey& key = plan->key;
  key.variant = v;
  key.head_dim = static_cast<uint16_t>(p.head_dim);
  key.rotary_dim = static_cast<uint16_t>(p.rotary_dim);
  key.rotary_offset = static_cast<uint16_t>(p.rotary_offset);
  const int bytes = RopeDtypeBytes(v.dtype);
  int vector = ChooseVector(turn, 16);
  vector = Alignment(vector, call.q, bytes, {call.q_strides.batch, call.q_strides.token, call.q_strides.head});
  if (call.k)
    vector = Alignment(vector, call.k, bytes, {call.k_strides.batch, call.k_strides.token, call.k_strides.head});
  const HeadDeal deal = DealHead(turn, vector);
  key.vector = static_cast<uint8_t>(deal.vector);
  key.lanes = static_cast<uint8_t>(deal.lanes);
  key.threads = kThreads;
  key.token_groups = static_cast<uint16_t>(32 / deal.lanes);
  key.batched = p.batch > 1;
  key.unit_scaling = p.attention_scaling == 1.0f;
  key.eps = p.eps;
  key.dense_indices = (v.positions_dtype == kRopeNoDtype || p.tokens <= 1 || p.positions_token == 1) &&
                      (v.offsets_dtype == kRopeNoDtype || p.tokens <= 1 || p.offsets_token == 1);
  key.table_vector = TableVector(turn, deal.vector, /*flat=*/false);
  const rope_shape shape = ShapeOf(ChoicesOf(key));
  const int elements = (2 * shape.units_per_lane + shape.rest_per_lane) * deal.vector;
  const int at_once = elements <= kMostElements ? kBlocksAtOnce : 1;
  key.min_blocks = static_cast<uint8_t>(at_once);

  if (rows > 0 && heads > 0) {
    // As many blocks as run at once, dealt to q and k by their heads; each warp of a block has a token at least.
    const int64_t most = (rows - 1) / kWarps + 1, blocks = int64_t{std::max(device.sm_count, 1)} * at_once;
    const auto share = [&](int64_t own) {
      return own == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>((blocks * own + heads / 2) / heads, 1, most));
    };
    plan->q_blocks = share(p.q_heads);
    plan->k_blocks = share(p.k_heads);
  }
  const int weights = (call.q_weight_grad ? 1 : 0) + (call.k_weight_grad ? 1 : 0);
  key.backward = weights ? kCudaBackwardAndSums : kCudaBackward;
  if (weights == 0) return {};
  plan->sums_key.backward = kCudaSums;
  plan->sums_key.threads = 32;
  plan->sums_blocks = static_cast<uint32_t>(weights * p.head_dim);
  plan->workspace = (int64_t{plan->q_blocks} + plan->k_blocks) * 2 * p.head_dim;
  return {};
}

}  // namespace ropewalk
