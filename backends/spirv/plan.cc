// SPDX-License-Identifier: Apache-2.0
#include "backends/spirv/plan.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "backends/spirv/kernel/index.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {
namespace {

// Whether a run of pairs that a vector takes lies in the table side by side, aligned for one access.
bool TableVector(const RopeCall& call, int vector) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  if (v.table_dtype == kRopeNoDtype || v.axes || p.cos_pair != 1 || p.sin_pair != 1) return false;
  const int bytes = RopeDtypeBytes(v.table_dtype);
  const int run = std::min(v.pairing == ROPEWALK_INTERLEAVED && vector > 1 ? vector / 2 : vector, 16 / bytes);
  return run > 1 && Alignment(run, call.tensors.cos, bytes, {p.cos_batch, p.cos_row}) == run &&
         Alignment(run, call.tensors.sin, bytes, {p.sin_batch, p.sin_row}) == run;
}

// What spills nowhere, as Intel's compiler has it (scripts/report.sh intel --all): bytes of an access, and units that a
// lane keeps in registers. With registers of 32 bytes there is half the room; rounding in between takes more of it.
int AccessBytes(const RopeVariant& v, int register_bytes) {
  const bool fp8 = v.cache_dtype == kRopeE4M3 || v.cache_dtype == kRopeE5M2;
  const bool stores = v.cache_dtype != kRopeNoDtype;
  const bool rounds = v.rounding == kRopeRoundReference;
  if (v.dtype == kRopeF32) return register_bytes >= 64 ? 16 : 8;
  if (register_bytes >= 64) return v.norm && fp8 && rounds ? 8 : 16;
  // Weights of 32 bits, and a second place for a head, take registers too.
  const bool more = rounds || v.out_of_place || v.weight_dtype == kRopeF32;
  return v.norm && (fp8 || (stores && more)) ? 4 : 8;
}
int MostUnits(const RopeVariant& v, int access_bytes, int register_bytes) {
  const bool fp8 = v.cache_dtype == kRopeE4M3 || v.cache_dtype == kRopeE5M2;
  const bool rounds = v.rounding == kRopeRoundReference;
  if (register_bytes >= 64) {
    if (v.dtype != kRopeF32 && (rounds || (v.norm && fp8))) return 1;
    return ROPE_MOST_UNITS(access_bytes);
  }
  const bool plain = !v.norm && v.cache_dtype == kRopeNoDtype && !rounds;
  return plain && access_bytes < 8 ? 2 : 1;
}
// Where units are too many for registers and taken in a loop, an access of 8 bytes is too much for these.
bool SpillsInALoop(const RopeVariant& v, int register_bytes) {
  return register_bytes < 64 && v.dtype != kRopeF32 && v.pairing == ROPEWALK_INTERLEAVED && v.norm &&
         v.cache_dtype != kRopeNoDtype;
}

// For a division by `size` (>= 1) of any n < 2^63: the upper half of 2 n x multiplier, shifted.
void ChoosePages(int64_t size, rope_spirv_shape* shape) {
  __extension__ using Wide = unsigned __int128;
  const auto divisor = static_cast<uint64_t>(std::max<int64_t>(size, 1));
  const int shift = static_cast<int>(std::bit_width(divisor - 1));
  shape->page_shift = shift;
  shape->page_multiplier = static_cast<rw_u64>(((Wide{1} << (63 + shift)) + divisor - 1) / divisor);
}

// Of RopeTensors, in their order.
constexpr std::array<const char*, kRopeSpirvTurns> TensorNames() {
  return {
#define X(name, type) #name,
      ROPE_TENSORS(X)
#undef X
  };
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What the plan of the gradient does alike

void ChooseSpirvLanes(int units, int most, int* lanes, int* each) {
  *lanes = ROPE_SUB_GROUP;
  *each = 0;
  int best_busy = 0;
  for (int candidate = 1; candidate <= most; candidate *= 2) {
    const int needed = (units + candidate - 1) / candidate;
    if (needed > ROPE_SUB_GROUP) continue;
    const int busy = 64 / candidate * (ROPE_SUB_GROUP / needed) * units / ROPE_SUB_GROUP;  // 1/64 of what could be
    if (busy <= best_busy) continue;
    best_busy = busy;
    *lanes = needed;
    *each = candidate;
  }
}

void FillSpirvPlan(const RopeCall& call, const SpirvDevice& device, int vector, int lanes, int each,
                   RopeSpirvPlan* plan) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const int units = p.rotary_dim / (2 * vector);
  const bool rest_matters = v.norm || v.out_of_place || v.store_k;
  const int rest = rest_matters ? (p.head_dim - p.rotary_dim) / vector : 0;
  if (rest > 4 * units) lanes = ROPE_SUB_GROUP;  // most of the head is not rotated
  const bool exact = each > 0 && lanes * each == units && (lanes == 4 || lanes == 8 || lanes == 16);

  RopeSpirvKey& key = plan->key;
  key.dtype = v.dtype;
  key.vector = static_cast<uint8_t>(vector);
  key.constants[kRopeSpecInterleaved] = v.pairing == ROPEWALK_INTERLEAVED;
  key.constants[kRopeSpecNorm] = v.norm;
  key.constants[kRopeSpecWeightDtype] = v.weight == kRopeNoWeight ? uint8_t{kRopeNoDtype} : v.weight_dtype;
  key.constants[kRopeSpecReference] = v.rounding == kRopeRoundReference;
  key.constants[kRopeSpecTableDtype] = v.table_dtype;
  key.constants[kRopeSpecTableVector] = TableVector(call, vector);
  key.constants[kRopeSpecAxes] = v.axes != 0;
  key.constants[kRopeSpecCacheDtype] = v.cache_dtype;
  key.constants[kRopeSpecOutOfPlace] = v.out_of_place;
  key.constants[kRopeSpecStoreOnly] = v.store_k == kRopeStoreOnly;
  key.constants[kRopeSpecUnits] = static_cast<uint8_t>(each);
  key.constants[kRopeSpecLanes] = static_cast<uint8_t>(exact ? lanes : 0);

  rope_spirv_shape& s = plan->shape;
  std::ranges::copy(key.constants, s.choices);
  if (device.general) {
    std::fill_n(key.constants.begin(), int{kRopeSpecUnits}, uint8_t{kRopeSpecArgument});
    key.constants[kRopeSpecLanes] = 0;
  }
  ChoosePages(p.page_size, &s);
  s.lanes = lanes;
  s.lane_multiplier = (65536 + lanes - 1) / lanes;
  s.heads_at_once = ROPE_HEADS_AT_ONCE(lanes);
  s.units = units;
  s.rest = rest;
  s.before = p.rotary_offset / vector;
  s.head_vectors = p.head_dim / vector;
  s.v_vectors = v.store_v ? p.v_dim / vector : 0;
  s.heads = p.q_heads + (call.tensors.k ? p.k_heads : 0);
  s.all_heads = s.heads + (v.store_v ? p.k_heads : 0);
  s.written_heads = v.store_k == kRopeStoreOnly ? p.q_heads : s.heads;
  s.positions_dtype = v.positions_dtype;
  s.offsets_dtype = v.offsets_dtype;
  s.slots_dtype = v.slots_dtype;
  s.check_axes = v.axes == 2;
  s.store_k = v.store_k != kRopeNoStore;
  s.store_v = v.store_v;
  s.zero_centered = v.weight == kRopeZeroCenteredWeight;
  s.sine_flip = v.inverse ? 0x80000000u : 0u;
  s.inverse_head_dim = 1.0f / static_cast<float>(p.head_dim);
}

// ---------------------------------------------------------------------------------------------------------------------
// The plan of the operation

Status PlanRopeSpirv(const RopeCall& call, const SpirvDevice& device, RopeSpirvPlan* plan) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  *plan = {};
  const int64_t rows = p.batch * p.tokens;
  const int heads = p.q_heads + (t.k ? p.k_heads : 0);
  const int all_heads = heads + (v.store_v ? p.k_heads : 0);
  if (rows == 0 || all_heads == 0) return {};
  if (rows > INT32_MAX) {
    return Status::Invalid(Text("rope: q must have fewer than 2^31 tokens on a GPU, but has ", rows));
  }

  const int bytes = RopeDtypeBytes(v.dtype);
  int vector = 0, units = 0, lanes = 0, each = 0;
  const auto choose = [&](int access_bytes) {
    vector = ChooseVector(call, access_bytes);
    units = p.rotary_dim / (2 * vector);
    ChooseSpirvLanes(units, MostUnits(v, vector * bytes, device.register_bytes), &lanes, &each);
  };
  choose(AccessBytes(v, device.register_bytes));
  if (each == 0 && SpillsInALoop(v, device.register_bytes)) choose(4);
  FillSpirvPlan(call, device, vector, lanes, each, plan);
  rope_spirv_shape& s = plan->shape;

  // Many tokens: a few sub-groups for each, so that a lane's sines serve several heads; few tokens: as many as there
  // are heads, until the device is busy twice over.
  const int64_t turns = (all_heads + s.heads_at_once - 1) / s.heads_at_once;
  const int64_t busy = 2 * std::max(device.threads, 1);
  const int64_t least = device.threads >= 64 ? 4 : 1;
  const int64_t wanted = std::clamp<int64_t>((busy + rows - 1) / rows, std::min(least, turns), turns);
  const int64_t most = std::clamp(device.max_local / ROPE_SUB_GROUP, 1, 8);
  const int64_t together = std::min(wanted, most);
  plan->local = static_cast<uint32_t>(together * ROPE_SUB_GROUP);
  plan->groups[0] = static_cast<uint32_t>(p.tokens);
  plan->groups[1] = static_cast<uint32_t>((wanted + together - 1) / together);
  plan->groups[2] = static_cast<uint32_t>(p.batch);
  s.sub_groups = static_cast<int>(together);
  s.step = static_cast<int>(plan->groups[1]) * s.sub_groups * s.heads_at_once;
  plan->why = wanted > least ? "few tokens: the heads of a token are spread over sub-groups"
                             : "many tokens: the sub-groups of a token share its heads";
#ifndef NDEBUG
  if (const std::string fault = RopeSpirvPlanFault(call, device, *plan); !fault.empty())
    return Status::Internal(Text("rope: a plan for SPIR-V is wrong: ", fault));
#endif
  return {};
}

const SpirvModule* RopeSpirvModuleOf(const RopeSpirvKey& key) {
  for (const SpirvModule& module : RopeSpirvModules()) {
    if (module.entry == key.entry && module.dtype == key.dtype && module.vector == key.vector) return &module;
  }
  return nullptr;
}

std::vector<SpirvConstant> RopeSpirvConstants(const RopeSpirvKey& key) {
  std::vector<SpirvConstant> constants;
  for (uint32_t i = 0; i < kRopeSpecCount; ++i) {
    const bool of_backward = i != kRopeSpecNorm && i != kRopeSpecOutOfPlace && i != kRopeSpecStoreOnly;
    if (key.entry == kSpirvRope || (key.entry == kSpirvBackward && of_backward)) {
      constants.push_back({i, key.constants[i]});
    }
  }
  return constants;
}

std::string RopeOpenClDefines(const RopeSpirvKey& key) {
  std::string text =
      Text("-DROPE_ENTRY=", int{key.entry}, " -DROPE_DTYPE=", int{key.dtype}, " -DROPE_VECTOR=", int{key.vector});
  for (size_t i = 0; i < kRopeSpecCount; ++i) Append(&text, Text(" -DROPE_SPEC_", i, "=", int{key.constants[i]}));
  return text;
}

const char* RopeSpirvFunction(const RopeSpirvKey& key) {
  return key.entry == kSpirvRope       ? "rope_kernel"
         : key.entry == kSpirvBackward ? "rope_backward_kernel"
                                       : "rope_sums_kernel";
}

std::string RopeSpirvName(const RopeSpirvKey& key) {
  constexpr const char* kDtypes[] = {"", "float32", "float16", "bfloat16", "e4m3", "e5m2"};
  const auto& c = key.constants;
  if (key.entry == kSpirvSums) return "backward sums";
  const bool backward = key.entry == kSpirvBackward;
  std::string name = backward ? "backward " : "";
  if (c[kRopeSpecNorm] == kRopeSpecArgument) {
    return Text(name, kDtypes[key.dtype], " general v", int{key.vector}, " u", int{c[kRopeSpecUnits]});
  }
  if (backward && c[kRopeSpecSums]) name = "backward+sums ";
  Append(&name, Text(kDtypes[key.dtype], c[kRopeSpecInterleaved] ? " interleaved" : " neox"));
  if (c[kRopeSpecNorm]) {
    Append(&name, Text(" rms", c[kRopeSpecWeightDtype] ? Text("*w:", kDtypes[c[kRopeSpecWeightDtype]]) : Text()));
  }
  if (c[kRopeSpecReference]) name += " reference";
  Append(&name, c[kRopeSpecTableDtype]
                    ? Text(" table:", kDtypes[c[kRopeSpecTableDtype]], c[kRopeSpecTableVector] ? " wide" : "")
                    : Text(" turns"));
  if (c[kRopeSpecAxes]) name += " axes";
  if (!backward && c[kRopeSpecCacheDtype]) Append(&name, Text(" store:", kDtypes[c[kRopeSpecCacheDtype]]));
  if (c[kRopeSpecStoreOnly]) name += " k only";
  if (!backward && c[kRopeSpecOutOfPlace]) name += " out";
  return Text(name, " v", int{key.vector}, " u", int{c[kRopeSpecUnits]}, " l", int{c[kRopeSpecLanes]});
}

void FillRopeSpirvArgs(const RopeCall& call, const RopeSpirvPlan& plan, const void* frequencies, void* fault,
                       RopeSpirvArgs* args) {
  static_assert(sizeof(RopeTensors) == kRopeSpirvTurns * sizeof(void*), "the kernel takes the tensors in this order");
  constexpr size_t kAxes = offsetof(RopeTensors, axes) / sizeof(void*);
  std::memcpy(args->pointers.data(), &call.tensors, sizeof(RopeTensors));
  if (!call.tensors.axes && call.variant.axes) {
    args->pointers[kAxes] = static_cast<const char*>(frequencies) + AxesOffset(*call.frequencies);
  }
  args->pointers[kRopeSpirvTurns] = frequencies;
  args->pointers[kRopeSpirvFault] = fault;
  args->params = {call.params, plan.shape};
  static constexpr auto kNames = TensorNames();
  args->count = kRopeSpirvPointers;
  args->ours = kRopeSpirvTurns;
  args->bytes = sizeof(args->params);
  args->names = kNames.data();
}

}  // namespace ropewalk
