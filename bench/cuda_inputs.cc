// What the model of costs knows of each shape that a search tried (backends/cuda/cost.h). Reads lines of `ropewalk tune
// --all --json`; writes a line for each shape: whether it suits the call, and the inputs. For bench/cuda_table.py.
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "backends/cuda/cost.h"
#include "backends/cuda/shapes.h"

namespace ropewalk {
namespace {

// Packed bfloat16 rows on an H200, as LowerRope would make the call; addresses are numbers.
RopeCall CallOf(const nlohmann::json& searched) {
  RopeCall call;
  std::memset(&call.params, 0, sizeof(call.params));
  RopeVariant& v = call.variant;
  rope_params& p = call.params;
  RopeTensors& t = call.tensors;
  p.batch = 1;
  p.tokens = searched.at("tokens").get<int64_t>();
  p.q_heads = searched.at("q_heads").get<int>();
  p.k_heads = searched.at("k_heads").get<int>();
  p.head_dim = searched.at("head_dim").get<int>();
  p.rotary_dim = searched.at("rotary_dim").get<int>();
  v.dtype = kRopeBF16;
  v.norm = searched.at("norm").get<bool>();
  v.weight_dtype = v.norm ? kRopeBF16 : kRopeNoDtype;
  v.table_dtype = searched.at("table").get<bool>() ? kRopeF32 : kRopeNoDtype;
  const int64_t row = (p.q_heads + 2 * p.k_heads) * int64_t{p.head_dim};
  p.q = p.k = p.v = p.q_out = p.k_out = {p.tokens * row, row, p.head_dim};
  const auto address = [&](int64_t elements) {
    return reinterpret_cast<void*>((uintptr_t{1} << 44) + 2 * static_cast<uintptr_t>(elements));
  };
  t.q = t.q_out = address(0);
  t.k = t.k_out = address(int64_t{p.q_heads} * p.head_dim);
  if (const int cache = searched.at("cache").get<int>()) {
    v.store_v = 1;
    v.store_k = cache > 2 ? kRopeStoreOnly : kRopeStore;
    v.cache_dtype = cache % 2 == 0 ? kRopeE4M3 : kRopeBF16;
    if (cache > 2) t.k_out = nullptr;
    p.v_dim = p.head_dim;
    p.k_cache = p.v_cache = {0, int64_t{p.k_heads} * p.head_dim, p.head_dim};
    t.v = address((p.q_heads + p.k_heads) * int64_t{p.head_dim});
    t.k_cache = t.v_cache = reinterpret_cast<void*>(uintptr_t{1} << 45);
  }
  return call;
}

RopeCudaShape ShapeOf(const nlohmann::json& numbers) {
  const auto n = numbers.get<std::array<uint8_t, 10>>();
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
}

void Run() {
  constexpr CudaDevice kH200 = {132, 9, 0, true};
  std::string line;
  while (std::getline(std::cin, line)) {
    const nlohmann::json searched = nlohmann::json::parse(line);
    const RopeCall call = CallOf(searched);
    for (const nlohmann::json& tried : searched.at("tried")) {
      const RopeCudaShape shape = ShapeOf(tried.at(0));
      const CostInputs inputs = CostInputsOf(call, kH200, shape);
      std::printf("%d ", RopeCudaShapeSuits(call, kH200, shape) ? 1 : 0);
      for (const float input : std::bit_cast<std::array<float, kCostInputs>>(inputs)) std::printf("%.6g ", input);
      std::printf("\n");
    }
  }
}

}  // namespace
}  // namespace ropewalk

int main() try { ropewalk::Run(); } catch (const std::exception& error) {
  std::fprintf(stderr, "cuda_inputs: %s\n", error.what());
  return 1;
}
