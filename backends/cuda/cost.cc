// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/cost.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "backends/cuda/shapes.h"

namespace ropewalk {
namespace {

// As in bench/cuda_table.py.
constexpr size_t kHidden1 = 48, kHidden2 = 24, kNetworks = 2;

// Two hidden layers: the weights of each layer's inputs, one input after the other, then what is added.
struct Network {
  float weight1[kCostInputs][kHidden1], bias1[kHidden1];
  float weight2[kHidden1][kHidden2], bias2[kHidden2];
  float weight3[kHidden2];
};
constexpr std::array kNumbers = std::to_array<float>({
#include "backends/cuda/cost_model.inc"
});
constexpr auto kModel = std::bit_cast<std::array<Network, kNetworks>>(kNumbers);

template <size_t kIn, size_t kOut>
std::array<float, kOut> Layer(const std::array<float, kIn>& in, const float (&weight)[kIn][kOut],
                              const float (&bias)[kOut]) {
  std::array<float, kOut> out;
  std::copy_n(bias, kOut, out.begin());
  for (size_t i = 0; i < kIn; ++i) {
    for (size_t j = 0; j < kOut; ++j) out[j] += in[i] * weight[i][j];
  }
  for (float& x : out) x = std::max(x, 0.0f);
  return out;
}

float Log2(double x) { return static_cast<float>(std::log2(std::max(x, 1e-3))); }

// Of a last row that is not full, the part that is: 1 if it is.
float LastPart(double rows) { return static_cast<float>(rows / std::ceil(std::max(rows, 1e-6))); }

}  // namespace

CostInputs CostInputsOf(const RopeCall& call, const CudaDevice& device, const RopeCudaShape& shape) {
  constexpr int kSharedOfMultiprocessor = 227 * 1024;
  RopeCudaPlan plan;
  LayOutRopeCuda(call, shape, &plan);
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const RopeCudaKey& key = plan.key;
  const rope_shape s = ShapeOf(ChoicesOf(key));
  const auto [heads, all_heads] = HeadsOf(call);
  const double multiprocessors = std::max(device.sm_count, 1);
  const double rows = static_cast<double>(p.batch * p.tokens);
  const int warps = key.threads / 32;
  const double turns = key.few_tokens ? 1.0 : static_cast<double>(Ceil(all_heads, HeadsAtOnce(s.grid)));
  const double blocks = static_cast<double>(plan.grid_x) * plan.grid_y / multiprocessors;
  const double room = std::max(
      1, std::min({MostCudaBlocks(device), kMostCudaWarps / warps, kSharedOfMultiprocessor / (s.shared_bytes + 1024)}));
  const int groups = GroupsPerWarp(s.grid);
  CostInputs in;
  in.few = key.few_tokens;
  in.access = Log2(key.vector * RopeDtypeBytes(v.dtype));
  in.in_flight = key.in_flight;
  in.flat = key.flat;
  in.turns = Log2(turns);
  in.warp_tokens = Log2(WarpTokens(s.grid));
  in.block_tokens = Log2(BlockTokens(s.grid));
  in.limited = !key.few_tokens && shape.resident != 0;
  in.resident = key.few_tokens ? 0.0f : static_cast<float>(shape.resident) / 32.0f;
  in.norm = v.norm;
  in.table = v.table_dtype != kRopeNoDtype;
  in.store = Stores(v);
  in.fp8 = StoresFp8(v);
  in.k_only = StoresKOnly(v);
  in.bytes = Log2(rows * static_cast<double>(heads) * s.span_bytes / multiprocessors);
  in.tokens = Log2(rows * kH200Multiprocessors / multiprocessors);
  in.heads = Log2(static_cast<double>(all_heads));
  in.lanes = Log2(key.lanes);
  in.groups = static_cast<float>(groups);
  in.block_warps = static_cast<float>(warps);
  in.all_warps = Log2(blocks * warps);
  in.blocks = Log2(blocks);
  in.last_block = LastPart(blocks);
  in.waves = Log2(blocks / room);
  in.last_wave = LastPart(blocks / room);
  in.busy =
      static_cast<float>(rows * static_cast<double>(all_heads) / (blocks * multiprocessors * turns * s.block_heads));
  in.used = static_cast<float>(groups * key.lanes) / 32.0f;
  in.rest = static_cast<float>(s.rest_per_lane);
  in.units = static_cast<float>(s.units_per_lane);
  in.head = Log2(s.span_bytes);
  in.part = static_cast<float>(p.rotary_dim) / static_cast<float>(p.head_dim);
  in.k_part = static_cast<float>(call.tensors.k ? p.k_heads : 0) / static_cast<float>(all_heads);
  in.shared = Log2(1.0 + s.shared_bytes * std::min(room, blocks));
  SetCostStart(RopeCudaStart(shape, p.batch * p.tokens, v.table_dtype != kRopeNoDtype), &in);
  return in;
}

void SetCostStart(int start, CostInputs* inputs) {
  inputs->ended = start == 1;
  inputs->issued = start == 3;
}

float RopeCudaCost(const CostInputs& inputs) {
  const auto values = std::bit_cast<std::array<float, kCostInputs>>(inputs);
  float cost = 0;
  for (const Network& network : kModel) {
    const auto hidden = Layer(Layer(values, network.weight1, network.bias1), network.weight2, network.bias2);
    for (size_t i = 0; i < hidden.size(); ++i) cost += hidden[i] * network.weight3[i];
  }
  return cost;
}

}  // namespace ropewalk
