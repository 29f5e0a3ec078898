// The text of a variant: its constants, and the one kernel that it names.
// SPDX-License-Identifier: Apache-2.0
#include <bit>

#include "backends/cuda/plan.h"
#include "base/text.h"

namespace ropewalk {

const char* RopeCudaFunction(const RopeCudaKey& key) {
  return key.backward == kCudaForward ? "rope_kernel" : "rope_backward_kernel";
}

std::string RopeCudaSource(const RopeCudaKey& key) {
  const bool backward = key.backward != kCudaForward;
  const std::string kernel = Text("extern \"C\" __global__ void __launch_bounds__(", key.threads,
                                  key.min_blocks ? Text(", ", key.min_blocks) : Text(), ") ", RopeCudaFunction(key),
                                  "(const __grid_constant__ ", backward ? "rope_backward_cuda_args" : "rope_cuda_args",
                                  " args) {\n  ropewalk::");
  if (key.backward == kCudaSums)
    return Text("#include \"backends/cuda/kernel/backward.cuh\"\n", kernel, "SumsBody(args);\n}\n");
  const RopeVariant& v = key.variant;
  const std::pair<const char*, int> constants[] = {
      {"Dtype", v.dtype},
      {"Interleaved", v.pairing == ROPEWALK_INTERLEAVED},
      {"Inverse", v.inverse},
      {"Norm", v.norm},
      {"Weight", v.weight},
      {"WeightDtype", v.weight_dtype},
      {"Rounding", v.rounding},
      {"TableDtype", v.table_dtype},
      {"PositionsDtype", v.positions_dtype},
      {"OffsetsDtype", v.offsets_dtype},
      {"SlotsDtype", v.slots_dtype},
      {"CacheDtype", v.cache_dtype},
      {"Axes", v.axes != 0},
      {"CheckAxes", v.axes == 2},
      {"StoreK", v.store_k != kRopeNoStore},
      {"StoreV", v.store_v},
      {"OutOfPlace", v.out_of_place},
      {"HeadDim", key.head_dim},
      {"RotaryDim", key.rotary_dim},
      {"RotaryOffset", key.rotary_offset},
      {"VDim", key.v_dim},
      {"Threads", key.threads},
      {"Vector", key.vector},
      {"Lanes", key.lanes},
      {"InFlight", key.in_flight},
      {"FewTokens", key.few_tokens},
      {"DependentLaunch", key.dependent_launch},
      {"TableVector", key.table_vector},
      {"QHeads", key.q_heads},
      {"KHeads", key.k_heads},
      {"QToken", key.q_token},
      {"KToken", key.k_token},
      {"Batched", key.batched},
      {"PageShift", key.page_shift},
      {"UnitScaling", key.unit_scaling},
      {"VToken", key.v_token},
      {"TableRow", key.table_row},
      {"CachePage", key.cache_page},
      {"CacheToken", key.cache_token},
      {"CacheHead", key.cache_head},
      {"DenseIndices", key.dense_indices},
      {"Flat", key.flat},
      {"Packed", key.packed},
      {"ScalePointers", key.scale_pointers},
      {"TokenGroups", key.token_groups},
      {"Full", key.full},
      {"Alike", key.alike},
      {"KStoreOnly", v.store_k == kRopeStoreOnly},
  };
  std::string text = Text("#include \"backends/cuda/kernel/", backward ? "backward" : "rope", ".cuh\"\nstruct K {\n");
  for (const auto& [name, value] : constants)
    Append(&text, Text("  static constexpr int k", name, " = ", value, ";\n"));
  Append(&text, Text("  static constexpr unsigned kEpsBits = ", std::bit_cast<uint32_t>(key.eps), "u;\n"));
  if (backward) Append(&text, Text("  static constexpr int kSums = ", key.backward == kCudaBackwardAndSums, ";\n"));
  return Text(text, "};\n", kernel, backward ? "BackwardBody" : "RopeBody", "<K>(args);\n}\n");
}

std::string RopeCudaName(const RopeCudaKey& key) {
  constexpr const char* kDtypes[] = {"", "float32", "float16", "bfloat16", "e4m3", "e5m2", "int32", "int64"};
  const RopeVariant& v = key.variant;
  if (key.backward == kCudaSums) return "backward sums";
  std::string name = Text(key.backward == kCudaForward    ? ""
                          : key.backward == kCudaBackward ? "backward "
                                                          : "backward+sums ",
                          kDtypes[v.dtype], v.pairing ? " interleaved" : " neox", v.inverse ? " inverse" : "");
  if (v.norm) {
    constexpr const char* kWeights[] = {" rms", " rms*w", " rms*(1+w)"};
    Append(&name, Text(kWeights[v.weight], v.weight ? Text(":", kDtypes[v.weight_dtype]) : ""));
  }
  if (v.rounding) name += " reference";
  Append(&name, v.table_dtype ? Text(" table:", kDtypes[v.table_dtype], "x", key.table_vector) : Text(" turns"));
  if (v.axes) name += v.axes == 2 ? " axes" : " frequency_axes";
  if (v.positions_dtype) Append(&name, Text(" positions:", kDtypes[v.positions_dtype]));
  if (v.offsets_dtype) Append(&name, Text(" offsets:", kDtypes[v.offsets_dtype]));
  if (v.cache_dtype) {
    Append(&name,
           Text(" store", v.store_k ? "_k" : "", v.store_k == kRopeStoreOnly ? "_only" : "", v.store_v ? "_v" : "", ":",
                kDtypes[v.cache_dtype], " slots:", kDtypes[v.slots_dtype], v.store_v ? Text(" v", key.v_dim) : ""));
  }
  if (v.out_of_place) name += " out";
  return Text(
      name, " d", key.head_dim, " r", key.rotary_dim, key.rotary_offset ? Text("@", key.rotary_offset) : "",
      key.q_heads ? Text(" h", key.q_heads, "/", key.k_heads) : Text(), key.few_tokens ? " few" : " many", " v",
      key.vector, " l", key.lanes, " x", key.in_flight, " t", key.threads,
      BlockTokens(ShapeOf(ChoicesOf(key)).grid) > 1 ? Text("/", BlockTokens(ShapeOf(ChoicesOf(key)).grid)) : Text(),
      key.flat ? Text(" flat", key.flat) : Text(), key.dependent_launch ? " pdl" : "");
}

}  // namespace ropewalk
