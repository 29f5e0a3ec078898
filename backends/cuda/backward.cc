// How the gradient is cut on an NVIDIA GPU.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "backends/cuda/kernel/backward_args.h"
#include "backends/cuda/plan.h"
#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

// The best of some forty ways to cut eleven shapes on an H200. With 8 warps and 3 stages heads of 128 take as long,
// those of 64 and 96 up to 1.2 times as long; with 16 warps all up to 1.1 times.
constexpr int kMostThreads = 128;        // of a block
constexpr int kStages = 2;               // heads on their way, of a group
constexpr int kWarpsAtOnce = 12;         // of a multiprocessor, where a thread has kFewElements at most
constexpr int kFewElements = 16;         // of a thread
constexpr int kSumBytes = 16 * 1024;     // Sums in kernel/sums.cuh
constexpr int kSharedBytes = 48 * 1024;  // of a block that asks for nothing
// What the angles of a token cost in a turn that begins one, in hundredths of a turn. Seen by the times at which blocks
// of q and of k end.
constexpr int64_t kAnglesOfTurn = 60;

// The work of a warp for the heads of a token, in hundredths of a turn.
int64_t WorkOf(int64_t heads, int64_t groups, int64_t piece_turns) {
  if (heads == 0) return 0;
  constexpr int64_t kTurn = 100;
  const int64_t piece = piece_turns * kTurn;
  const int64_t own = kTurn * heads / groups;
  // The turns in which some group begins a token: with heads that are no whole turns two for most tokens; and the first
  // one of each piece.
  int64_t begins = heads % groups == 0 ? kTurn : std::min(own, 2 * kTurn - kTurn / groups);
  if (own % piece == 0) {
    begins = own / piece_turns;
  } else if (piece % own != 0) {
    begins = std::min(own, begins + own / piece_turns);
  }
  return own + std::min(own, begins) * kAnglesOfTurn / kTurn;
}

// Whether all heads of x, of dY and of dX lie side by side, from the first token's first to the last one's last, at
// multiples of 16 bytes.
bool LieSideBySide(const RopeBackwardCall& call) {
  const rope_params& p = call.turn.params;
  const RopeTensors& t = call.turn.tensors;
  const int bytes = RopeDtypeBytes(call.turn.variant.dtype), whole = 16 / bytes;
  const auto lies = [&](const void* data, const rope_strides& s, int64_t heads) {
    return !data ||
           ((heads == 1 || s.head == p.head_dim) && (p.tokens == 1 || s.token == heads * p.head_dim) &&
            (p.batch == 1 || s.batch == p.tokens * heads * p.head_dim) && Alignment(whole, data, bytes, {}) == whole);
  };
  return p.head_dim % whole == 0 && lies(call.q, call.q_strides, p.q_heads) && lies(t.q, p.q, p.q_heads) &&
         lies(t.q_out, p.q_out, p.q_heads) && lies(call.k, call.k_strides, p.k_heads) && lies(t.k, p.k, p.k_heads) &&
         lies(t.k_out, p.k_out, p.k_heads);
}

}  // namespace

Status PlanRopeCudaBackward(const RopeBackwardCall& call, const CudaDevice& device, RopeCudaBackwardPlan* plan) {
  *plan = {};
  RopeCall turn = call.turn;
  turn.variant.out_of_place = 1;  // every element is written
  const rope_params& p = turn.params;
  const RopeVariant& v = turn.variant;
  const int64_t rows = p.batch * p.tokens;
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
  const int groups = 32 / deal.lanes;  // of a warp
  key.vector = static_cast<uint8_t>(deal.vector);
  key.lanes = static_cast<uint8_t>(deal.lanes);
  key.token_groups = static_cast<uint16_t>(groups);
  key.batched = p.batch > 1;
  key.unit_scaling = p.attention_scaling == 1.0f;
  key.eps = p.eps;
  key.dense_indices = (v.positions_dtype == kRopeNoDtype || p.tokens <= 1 || p.positions_token == 1) &&
                      (v.offsets_dtype == kRopeNoDtype || p.tokens <= 1 || p.offsets_token == 1);
  key.table_vector = TableVector(turn, deal.vector, /*flat=*/false);
  key.dependent_launch = device.major >= 9;

  // Blocks so small that a sum of each element of each thread fits, and as many stages as fit beside them.
  key.threads = 32;
  key.in_flight = 1;
  // Where accesses of 16 bytes straddle sectors of 32: heads of 80 take 1.17 of their floor so, else 1.38. With heads
  // of 64 it is as fast (1.15 and 1.16), with those of 96 slower (1.26 and 1.15). Of larger heads two stages would
  // not fit.
  constexpr int kMostFlatBytes = 1024;
  const bool flat = deal.vector * bytes == 16 && p.rotary_dim / 2 * bytes % 32 != 0 && p.rotary_dim == p.head_dim &&
                    p.head_dim * bytes <= kMostFlatBytes && LieSideBySide(call);
  key.flat = flat ? 1 : 0;
  const rope_shape of_warp = ShapeOf(ChoicesOf(key));
  const int elements = (2 * of_warp.units_per_lane + of_warp.rest_per_lane) * deal.vector;  // of a thread
  int threads = kMostThreads;
  while (threads > 32 && elements * threads * 8 > kSumBytes) threads /= 2;
  key.threads = static_cast<uint16_t>(threads);
  const int stage_bytes = threads / 32 * 2 * of_warp.stage_bytes + threads * 8;  // of x, dY and positions
  const int out_bytes = flat ? threads / 32 * of_warp.stage_bytes : 0;           // of dX
  const int stages = of_warp.staged ? std::min(kStages, (kSharedBytes - kSumBytes - out_bytes) / stage_bytes) : 0;
  key.in_flight = static_cast<uint8_t>(stages < 2 ? 0 : stages);
  const int warps = std::max(4, kWarpsAtOnce * kFewElements / std::max(kFewElements, elements));
  const int at_once = std::max(1, warps / (threads / 32));
  key.min_blocks = static_cast<uint8_t>(at_once);

  if (rows > 0 && p.q_heads + p.k_heads > 0) {
    // As many blocks as run at once, dealt to q and k by their work, so that all end together.
    const int weight_sums = call.q_weight_grad || call.k_weight_grad ? kSumBytes : 0;
    const int64_t fit = CudaSharedBytes(device) / (weight_sums + stages * stage_bytes + out_bytes + kCudaBlockBytes);
    const int64_t blocks = std::max(device.sm_count, 1) * std::clamp<int64_t>(fit, 1, at_once);
    const int piece_turns = RopePieceTurns(flat);
    const int64_t work_of_q = WorkOf(p.q_heads, groups, piece_turns);
    const int64_t all = work_of_q + WorkOf(p.k_heads, groups, piece_turns);
    const int64_t of_q = (blocks * work_of_q + all / 2) / all;
    const auto dealt = [&](int64_t heads, int64_t share) {
      const int64_t of_piece = int64_t{piece_turns} * groups, pieces = (rows * heads + of_piece - 1) / of_piece;
      const int64_t most = (pieces + threads / 32 - 1) / (threads / 32);
      return static_cast<int32_t>(heads > 0 ? std::clamp<int64_t>(share, 1, most) : 0);
    };
    plan->q_blocks = dealt(p.q_heads, of_q);
    plan->k_blocks = dealt(p.k_heads, blocks - of_q);
  }
  const int weights = (call.q_weight_grad ? 1 : 0) + (call.k_weight_grad ? 1 : 0);
  key.backward = weights ? kCudaBackwardAndSums : kCudaBackward;
  if (weights == 0) return {};
  const int row = RopeSumsRow(static_cast<int>(p.head_dim));
  plan->sums_key.backward = kCudaSums;
  plan->sums_key.threads = kRopeSumsThreads;
  plan->sums_blocks = static_cast<uint32_t>(weights * (row / kRopeSumsElements));
  const int64_t blocks = int64_t{plan->q_blocks} + plan->k_blocks;
  if (blocks > 0) plan->workspace = blocks * 2 * row + kRopeSumsElements - 1;
  return {};
}

}  // namespace ropewalk
