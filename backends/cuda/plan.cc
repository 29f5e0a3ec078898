// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cstdint>
#include <string_view>

#include "backends/cuda/shapes.h"
#include "base/text.h"
#include "rope/access.h"

namespace ropewalk {

int MostCudaBlocks(const CudaDevice& device) {
  const int arch = 10 * device.major + device.minor;
  return arch == 86 || arch == 87 ? 16 : arch == 89 || device.major >= 12 ? 24 : 32;
}

int CudaSharedBytes(const CudaDevice& device) {
  const int arch = 10 * device.major + device.minor;
  return 1024 * (arch == 80 || arch == 87 ? 164 : arch < 90 || device.major >= 12 ? 100 : 228);
}

namespace {

constexpr int64_t kSharedBytes = 48 * 1024, kMostGridY = 65535;

void LayOut(const RopeCall& call, RopeCudaShape shape, int64_t rows, int64_t all_heads, RopeCudaPlan* plan) {
  RopeCudaKey& key = plan->key;
  const bool plain = shape.few || !shape.flat || !FlatVectorFits(call, shape.vector);
  const HeadDeal deal =
      plain ? DealHead(call, PlainVector(call, shape.vector), shape.share) : DealHead(call, shape.vector);
  const int per_warp = deal.per_warp();
  key.few_tokens = shape.few != 0;
  key.vector = static_cast<uint8_t>(deal.vector);
  key.lanes = static_cast<uint8_t>(deal.lanes);
  key.flat = 0;
  if (shape.few) {
    const RopeVariant& v = call.variant;
    const bool v_rides = !v.store_v || call.params.v_dim == call.params.rotary_dim;
    // As many as a thread's registers hold.
    const int64_t units = Ceil(deal.units, deal.lanes);
    const int most = units <= 2 ? 8 : shape.share > 1 ? std::max(1, 32 / static_cast<int>(units * deal.vector)) : 1;
    const int heads = v_rides ? std::clamp<int>(shape.in_flight, 1, most) : 1;
    key.in_flight = static_cast<uint8_t>(heads);
    // About so many warps a block that none is without a head; no more blocks than those leave heads for.
    const int64_t warps = Ceil(all_heads, per_warp * heads);
    const int64_t wanted = std::max<int64_t>(1, (warps + shape.cut / 2) / std::max<int>(shape.cut, 1));
    const int64_t token_warps = std::clamp<int64_t>(Ceil(warps, std::min(wanted, kMostGridY)), 1, 32);
    if (Ceil(warps, token_warps) > kMostGridY) {  // of 2,000,000 heads and more
      shape.few = 0;
      return LayOut(call, shape, rows, all_heads, plan);
    }
    const int64_t tokens = std::clamp<int64_t>(std::min<int64_t>(shape.tokens, rows), 1, 32 / token_warps);
    key.token_groups = static_cast<uint16_t>(token_warps * per_warp);
    key.threads = static_cast<uint16_t>(token_warps * tokens * 32);
    plan->grid_y = static_cast<uint32_t>(Ceil(warps, token_warps));
    plan->grid_x = static_cast<uint32_t>(Ceil(rows, tokens));
    plan->why = "few tokens: the heads of a token are spread over blocks";
    return;
  }
  // Flat carries 16 bytes at a time, and heads of v only if they ride.
  if (plain && deal.vector * RopeDtypeBytes(call.variant.dtype) != 16) shape.flat = 0;
  const bool v_rides = call.params.v_dim == call.params.rotary_dim && call.params.v_dim == call.params.head_dim;
  if (shape.flat > 1 && call.variant.store_v && !v_rides) shape.flat = 1;
  key.flat = shape.flat;
  const bool shares = shape.warp_tokens > 1 && !shape.flat && per_warp * deal.lanes == 32;
  // A part of the lanes that divides them.
  const auto most = static_cast<unsigned>(std::min<int>(shape.warp_tokens, per_warp));
  const int warp_tokens = shares ? static_cast<int>(std::bit_floor(most)) : 1;
  const int64_t rounds = Ceil(all_heads, int64_t{per_warp} * std::max<int>(shape.flat, 1));
  int64_t warps = warp_tokens > 1 ? 1 : std::clamp<int64_t>(Ceil(rounds, std::max<int>(shape.cut, 1)), 1, 32);
  int64_t tokens = std::clamp<int64_t>(Ceil(std::min<int64_t>(shape.tokens, rows), warp_tokens), 1, 32 / warps);
  const auto shared = [&](int64_t stages) -> int64_t {
    key.token_groups = static_cast<uint16_t>(warp_tokens > 1 ? per_warp / warp_tokens : warps * per_warp);
    key.threads = static_cast<uint16_t>(warps * tokens * 32);
    key.in_flight = static_cast<uint8_t>(stages);
    return ShapeOf(ChoicesOf(key)).shared_bytes;
  };
  while (tokens > 1 && shared(1) > kSharedBytes) tokens /= 2;
  while (warps > 1 && shared(1) > kSharedBytes) warps /= 2;
  shared(1);
  const int64_t turns = Ceil(all_heads, HeadsAtOnce(ShapeOf(ChoicesOf(key)).grid));
  int64_t stages = std::min<int64_t>(shape.in_flight, turns);
  while (stages > 0 && shared(stages) > kSharedBytes) --stages;
  shared(stages);
  if (stages == 0 && !plain) {  // a thread's share of a half is fetched side by side or not at all
    shape.flat = 0;
    return LayOut(call, shape, rows, all_heads, plan);
  }
  if (stages == 0) key.flat = 0;
  plan->grid_x = static_cast<uint32_t>(Ceil(rows, tokens * warp_tokens));
  plan->why = tokens * warp_tokens > 1 ? "many tokens: a block for several of them" : "many tokens: a block for each";
}

// How many warps of a kernel with odd vectors shall fit a multiprocessor. A thread needs 64 registers for vectors of 10
// elements (32 warps) and 48 for vectors of 6 (40 warps). It needs more if it stores, if strides are no constants, or
// if it reads a table element by element.
int OddWarps(const RopeCudaKey& key) {
  const RopeVariant& v = key.variant;
  const bool regular = std::has_single_bit(key.lanes), fp8 = StoresFp8(v);
  const bool slow_table = v.table_dtype != kRopeNoDtype && key.table_vector == 1;
  if (!key.packed) return 20;
  if (Stores(v) && (key.vector == 10 ? fp8 : !regular && !fp8)) return 24;
  return regular || slow_table || Stores(v) ? 32 : 40;
}

// How many blocks must fit a multiprocessor, which limits registers: enough for `resident` warps where a search found
// that to be fast and nothing spills, else 1. With 0 the compiler is free to choose, and it spills a few bytes of some
// kernels to gain occupancy.
int MinBlocks(const RopeCudaKey& key, const CudaDevice& device, int64_t rows, int resident) {
  const RopeVariant& v = key.variant;
  const int warps = key.threads / 32;
  const bool table = v.table_dtype != kRopeNoDtype, partial = key.rotary_dim != key.head_dim;
  const bool regular = std::has_single_bit(key.lanes);
  const bool usual = v.rounding == kRopeRoundFused && !v.out_of_place && key.q_heads != 0 &&
                     key.rotary_dim == 2 * key.vector * key.lanes;
  if (!usual || key.few_tokens || v.dtype == kRopeF32 || key.vector < 6) return 1;
  if (resident == 0) {
    const bool spills = (key.flat && rows < 3072) || (partial && table && v.table_dtype != kRopeF32) ||
                        (v.norm && table && (partial || v.axes)) ||
                        (v.norm && !table && key.in_flight == 1 && !std::has_single_bit(static_cast<unsigned>(warps)));
    return device.major == 9 && !spills ? 0 : 1;
  }
  if (partial || (table && key.table_vector == 1 && key.vector == 8)) return 1;
  if (table && Stores(v) && key.flat && !regular) return 1;  // it needs more than 64 registers
  if (StoresFp8(v) && v.dtype == kRopeF16 && v.pairing == ROPEWALK_INTERLEAVED && key.vector == 8) {
    resident = std::min(resident, 20);  // it needs more than 80
  }
  if (v.table_dtype == kRopeF32 && (!regular || key.lanes == 32)) resident = std::min(resident, 32);  // ditto, 48
  const int most = key.vector == 8 ? 16 : MostCudaBlocks(device);
  return std::clamp(std::min(resident, kMostCudaWarps) / warps, 1, most);
}

// at_once, crowded_from and crowded_to: 4,096 blocks of a warp run at once if 32 fit a multiprocessor of an H200; by 68
// registers 28 do, and the rest takes a whole round: 17.1 us instead of 14.9 (32/8 heads of 64, norm and store). 3 % of
// a round are hidden by the next kernel's start; with a quarter fewer registers most kernels do not spill. Measured on
// 2026-12-01 (docs/cuda.md).
void SetAtOnce(const CudaDevice& device, RopeCudaPlan* plan) {
  constexpr int kLeast = 40, kMost = 168;
  if (device.major != 9 || plan->key.few_tokens) return;
  const int64_t blocks = int64_t{plan->grid_x} * plan->grid_y;
  const auto fit = [&](int registers) {
    return int64_t{ResidentBlocks(plan->key, device, registers)} * device.sm_count;
  };
  int limit = kMost;
  while (limit >= kLeast && blocks > fit(limit)) limit -= kCudaRegisterStep;
  if (limit < kLeast) return;
  const int most = limit + limit / 4;
  for (int registers = limit + kCudaRegisterStep; registers <= most; registers += kCudaRegisterStep) {
    if (blocks * 100 <= fit(registers) * 103) continue;
    plan->at_once = ResidentBlocks(plan->key, device, limit);
    plan->crowded_from = registers - kCudaRegisterStep + 1;
    plan->crowded_to = most;
    return;
  }
}

}  // namespace

int ResidentBlocks(const RopeCudaKey& key, const CudaDevice& device, int registers) {
  const int warps = key.threads / 32;
  const int of_warp = 32 * ((registers + kCudaRegisterStep - 1) / kCudaRegisterStep * kCudaRegisterStep);
  const int shared = ShapeOf(ChoicesOf(key)).shared_bytes + kCudaBlockBytes;
  return std::min({4 * (kCudaPartRegisters / of_warp) / warps, kMostCudaWarps / warps, MostCudaBlocks(device),
                   CudaSharedBytes(device) / shared});
}

RopeCudaKey AtOnceKey(const RopeCudaPlan& plan) {
  RopeCudaKey key = plan.key;
  key.min_blocks = static_cast<uint8_t>(plan.at_once);
  key.at_once = 1;
  return key;
}

uint8_t TableVector(const RopeCall& call, int vector, bool flat) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  if (v.table_dtype == kRopeNoDtype || p.cos_pair != 1 || p.sin_pair != 1 || v.axes) return 1;
  const int table_bytes = RopeDtypeBytes(v.table_dtype);
  int table_vector = 16 / table_bytes;
  // A run of pairs begins at a multiple of the vector, or of half of it where neighbours share one; and an axis may
  // end anywhere.
  const bool halved = v.pairing == ROPEWALK_INTERLEAVED && vector > 1 && (!flat || vector % 8 == 0);
  const int run = halved ? vector / 2 : vector;
  table_vector = std::min(table_vector, run);
  if (halved) {
    while (table_vector > 1 && (p.rotary_dim / 4) % table_vector) table_vector /= 2;
  }
  while (table_vector > 1 && run % table_vector) table_vector /= 2;
  table_vector = Alignment(table_vector, call.tensors.cos, table_bytes, {p.cos_batch, p.cos_row});
  table_vector = Alignment(table_vector, call.tensors.sin, table_bytes, {p.sin_batch, p.sin_row});
  return static_cast<uint8_t>(table_vector);
}

void LayOutRopeCuda(const RopeCall& call, const RopeCudaShape& shape, RopeCudaPlan* plan) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  RopeCudaKey& key = plan->key;
  key.variant = v;
  key.head_dim = static_cast<uint16_t>(p.head_dim);
  key.rotary_dim = static_cast<uint16_t>(p.rotary_dim);
  key.rotary_offset = static_cast<uint16_t>(p.rotary_offset);
  key.v_dim = static_cast<uint16_t>(v.store_v ? p.v_dim : 0);
  LayOut(call, shape, p.batch * p.tokens, HeadsOf(call).all, plan);
}

Status PlanRopeCuda(const RopeCall& call, const CudaDevice& device, RopeCudaOptions options, RopeCudaPlan* plan) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  *plan = {};
  const int64_t rows = p.batch * p.tokens;
  const auto [heads, all_heads] = HeadsOf(call);
  if (rows == 0 || all_heads == 0) return {};
  if (rows > INT32_MAX) {
    return Status::Invalid(Text("rope: q must have fewer than 2^31 tokens on a GPU, but has ", rows));
  }

  RopeCudaKey& key = plan->key;
  const int bytes = RopeDtypeBytes(v.dtype);
  plan->origin = RopeCudaOrigin::kGiven;
  if (options.rules) plan->origin = RopeCudaOrigin::kRules;
  const RopeCudaShape shape = options.shape   ? *options.shape
                              : options.rules ? RopeCudaShapeByRules(call, device, options.layout)
                                              : ChooseRopeCudaShape(call, device, options.layout, &plan->origin);
  LayOutRopeCuda(call, shape, plan);
  plan->shape = shape;
  plan->shape.start = RopeCudaStart(shape, rows, v.table_dtype != kRopeNoDtype);
  const bool few = key.few_tokens != 0;
  const int vector = key.vector;
  if (options.dependent_launch && device.major >= 9) key.dependent_launch = plan->shape.start;
  key.batched = p.batch > 1;
  if (Stores(v)) {
    const auto page_size = static_cast<uint64_t>(p.page_size);
    key.page_shift = p.page_size == p.slots           ? kFlatPages
                     : std::has_single_bit(page_size) ? static_cast<uint16_t>(1 + std::countr_zero(page_size))
                                                      : uint16_t{0};
  }
  key.scale_pointers = t.k_scale || t.v_scale;
  key.unit_scaling = p.attention_scaling == 1.0f;
  key.eps = v.norm ? p.eps : 0.0f;
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  // A single token has no stride.
  const auto token_stride = [&](const rope_strides& s) { return p.tokens > 1 ? s.token : 1; };
  const auto dense = [&](const rope_strides& s, int count) {
    return (count <= 1 || s.head == p.head_dim) && token_stride(s) > 0 && token_stride(s) <= INT32_MAX;
  };
  if (!v.out_of_place && p.q_heads > 0 && p.q_heads <= UINT16_MAX && p.k_heads <= UINT16_MAX && dense(p.q, p.q_heads) &&
      (!t.k || dense(p.k, p.k_heads))) {
    key.q_heads = static_cast<uint16_t>(p.q_heads);
    key.k_heads = static_cast<uint16_t>(p.k_heads);
    key.q_token = static_cast<int32_t>(token_stride(p.q));
    key.k_token = t.k ? static_cast<int32_t>(token_stride(p.k)) : 0;
    // The strides decide it. A single token whose k happens to lie behind its q must not compile a kernel.
    key.packed = t.k && p.tokens > 1 && key.k_token == key.q_token && p.k.batch == p.q.batch &&
                 key.q_token >= (p.q_heads + p.k_heads) * p.head_dim &&
                 address(t.k) == address(t.q) + static_cast<uintptr_t>(int64_t{p.q_heads} * p.head_dim * bytes);
  }

  const auto dense_index = [&](int64_t stride) { return p.tokens <= 1 || stride == 1; };
  key.dense_indices = (v.positions_dtype == kRopeNoDtype || dense_index(p.positions_token)) &&
                      (v.offsets_dtype == kRopeNoDtype || dense_index(p.offsets_token)) &&
                      (v.slots_dtype == kRopeNoDtype || dense_index(p.slots_token));
  const auto fits = [](int64_t stride) { return stride > 0 && stride <= INT32_MAX; };
  if (v.store_v && (p.k_heads == 1 || p.v.head == p.v_dim) && fits(token_stride(p.v))) {
    key.v_token = static_cast<int32_t>(token_stride(p.v));
    const int64_t behind = int64_t{p.q_heads + p.k_heads} * p.head_dim;
    if ((few || key.flat) && key.packed && p.v_dim == p.head_dim && key.v_token == key.q_token &&
        p.v.batch == p.q.batch && key.q_token >= behind + int64_t{p.k_heads} * p.v_dim &&
        address(t.v) == address(t.q) + static_cast<uintptr_t>(behind * bytes)) {
      key.packed = 2;
    }
  }
  if (Stores(v)) {
    const rope_strides& cache = v.store_k ? p.k_cache : p.v_cache;
    const auto same = [&](const rope_strides& s) {
      return s.batch == cache.batch && s.token == cache.token && s.head == cache.head;
    };
    const int64_t head = p.k_heads == 1 ? 1 : cache.head;  // one head has no stride
    if ((!v.store_v || same(p.v_cache)) && fits(head) && fits(cache.token) && cache.batch >= 0 &&
        cache.batch <= INT32_MAX) {
      key.cache_head = static_cast<int32_t>(head);
      key.cache_token = static_cast<int32_t>(cache.token);
      key.cache_page = key.page_shift == kFlatPages ? 0 : static_cast<int32_t>(cache.batch);
    }
  }
  if (v.table_dtype != kRopeNoDtype && p.cos_pair == 1 && p.sin_pair == 1 && p.cos_row == p.sin_row &&
      fits(p.cos_row)) {
    key.table_row = static_cast<int32_t>(p.cos_row);
  }

  key.table_vector = TableVector(call, vector, key.flat != 0);
  const bool odd = key.vector == 6 || key.vector == 10;
  // Registers are limited only for the compute capability that was searched, and by a search on the device itself: for
  // another one the same text needs other numbers of them, and may spill.
  const bool searched = device.major == 9 || options.shape || plan->origin == RopeCudaOrigin::kTunedHere;
  const int blocks = searched ? MinBlocks(key, device, rows, odd ? OddWarps(key) : shape.resident) : 1;
  key.min_blocks = static_cast<uint8_t>(blocks);
  if (!options.rules) SetAtOnce(device, plan);  // bundles hold few variants

  // Facts of the grid that the kernel may rely on, if heads are constants and no thread is idle.
  const rope_shape derived = ShapeOf(ChoicesOf(key));
  if (few && key.q_heads != 0 && GroupsPerWarp(derived.grid) * key.lanes == 32) {
    const int64_t places = int64_t{plan->grid_y} * HeadsAtOnce(derived.grid);
    key.full = places == (derived.v_rides ? all_heads : heads);
    const int warp_heads = WarpHeads(derived.grid);
    key.alike = key.q_heads % warp_heads == 0 && key.k_heads % warp_heads == 0;
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// The text of a variant: its constants, and the one kernel that it names

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
    return Text("#include \"backends/cuda/kernel/sums.cuh\"\n", kernel, "SumsBody(args);\n}\n");
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
      key.flat ? Text(" flat", key.flat) : Text(), key.at_once ? Text(" at_once", key.min_blocks) : Text(),
      key.dependent_launch ? " pdl" : "");
}

}  // namespace ropewalk
