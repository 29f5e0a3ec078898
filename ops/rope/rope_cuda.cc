// SPDX-License-Identifier: Apache-2.0
#include "ops/rope/rope_cuda.h"

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/text.h"
#include "ops/rope/rope_access.h"

namespace ropewalk {
int MostCudaBlocks(const CudaDevice& device) {
  const int arch = 10 * device.major + device.minor;
  return arch == 86 || arch == 87 ? 16 : arch == 89 || device.major >= 12 ? 24 : 32;
}

namespace {

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool Stores(const RopeVariant& v) { return v.cache_dtype != kRopeNoDtype; }
bool StoresFp8(const RopeVariant& v) { return Stores(v) && v.cache_dtype != v.dtype; }

// Heads with a norm whose halves make no power of two of vectors of 16 bytes, fetched side by side: vectors of another
// size, so that fewer threads idle and more heads share a warp (docs/cuda.md). 0: those of an access are best.
int OddVector(const RopeCall& call, int64_t rows) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const int half = p.rotary_dim / 2;
  if (rows < 3072 || !v.norm || v.out_of_place || p.rotary_dim != p.head_dim || (v.store_v && p.v_dim != p.head_dim) ||
      v.rounding != kRopeRoundFused || RopeDtypeBytes(v.dtype) != 2 || RopeDtypeBytes(v.weight_dtype) != 2 ||
      ChooseVector(call, 16, true) != 8) {
    return 0;
  }
  if (half % 8 == 0 && std::has_single_bit(static_cast<unsigned>(half / 8))) return 0;
  const auto fits = [&](int vector) {
    return half % vector == 0 && half / vector <= 32 && std::has_single_bit(static_cast<unsigned>(half / vector));
  };
  if (fits(10) && v.table_dtype == kRopeNoDtype) return 10;  // a table's entries take registers that it has not got
  return fits(6) || (half % 8 != 0 && half % 6 == 0 && half / 6 <= 16) ? 6 : 0;
}

// The shape of a block for those: turns of a warp, and how many of them are on their way at once.
void PlanOdd(int64_t heads, int64_t per_warp, int64_t head_bytes, RopeCudaKey* key) {
  const bool regular = std::has_single_bit(key->lanes), store = Stores(key->variant);
  // Else the heads of a warp end within a sector: two rounds of them do not.
  key->flat = regular ? 1 : 2;
  const int64_t stages = Ceil(heads, per_warp * key->flat);
  const int64_t turns = store && regular ? 3 : store || regular ? 5 : 1, most = store && regular ? 2 : 3;
  const int64_t warps = std::min<int64_t>(Ceil(stages, turns), 8);
  const int64_t stage_bytes = warps * per_warp * key->flat * head_bytes;
  const int64_t codes_bytes = StoresFp8(key->variant) ? stage_bytes / 2 : 0;
  key->threads = static_cast<uint16_t>(warps * 32);
  key->in_flight = static_cast<uint8_t>(std::min({Ceil(stages, warps), most, (48 * 1024 - codes_bytes) / stage_bytes}));
}

// How many warps of those a multiprocessor is to hold: for vectors of 10 elements 64 registers, of 6 48; stores,
// strides and tables that are not told take registers of their own.
int OddWarps(const RopeCudaKey& key) {
  const RopeVariant& v = key.variant;
  const bool regular = std::has_single_bit(key.lanes), fp8 = StoresFp8(v);
  const bool slow_table = v.table_dtype != kRopeNoDtype && key.table_vector == 1;
  if (!key.packed) return 20;
  if (Stores(v) && (key.vector == 10 ? fp8 : !regular && !fp8)) return 24;
  return regular || slow_table || Stores(v) ? 32 : 40;
}

// Few tokens: bytes of an access, warps of a block, heads that a group takes at once. Searched on an H200
// (docs/cuda.md): first latency decides, then the number of instructions.
struct FewShape {
  int bytes, warps, heads;
};
FewShape PlanFew(const RopeVariant& v, int64_t bytes_per_multiprocessor) {
  if (bytes_per_multiprocessor <= 512) return {4, 4, 1};
  if (bytes_per_multiprocessor <= 6 * 1024) {
    if (StoresFp8(v)) return {8, 4, 1};
    return Stores(v) && bytes_per_multiprocessor > 5 * 512 ? FewShape{4, 6, 1} : FewShape{4, 4, 2};
  }
  if (Stores(v)) return {8, 12, 2};
  if (v.table_dtype != kRopeNoDtype) return {8, 10, 1};
  return v.norm ? FewShape{8, 5, 2} : FewShape{4, 10, 2};
}

// Many tokens, a block for each: how many warps it has and how many heads of a group are on their way at once. Searched
// on an H200 (docs/cuda.md): the more tokens, the less there is to gain from many loads of one, and the more from many
// blocks of a multiprocessor. A warp works on `per_warp` heads at once. Returns how many warps a multiprocessor is to
// hold; 0: as the compiler likes.
int PlanMany(const RopeVariant& v, int64_t rows, int64_t heads, int64_t all_heads, int64_t per_warp,
             int64_t stage_bytes, RopeCudaKey* key) {
  const bool store = Stores(v), table = v.table_dtype != kRopeNoDtype;
  const bool whole = v.dtype != kRopeF32 && key->vector == 8;  // accesses of 16 bytes
  const bool regular = whole && std::has_single_bit(key->lanes);
  // So many warps that their groups take the heads in so many turns.
  const auto warps_for = [&](int64_t turns, int64_t most) {
    return std::clamp<int64_t>(Ceil(Ceil(heads, turns), per_warp), 2, most);
  };
  int64_t warps = 0, in_flight = 2;
  int resident = store ? 24 : 0;
  if (rows < 768) {
    warps = std::clamp<int64_t>(Ceil(all_heads, per_warp), 2, 16);
  } else if (rows < 1536) {
    warps = store ? 2 : 4;
    in_flight = 5;
  } else if (rows < 3072) {
    warps = store ? 3 : 2;
    in_flight = store ? 2 : 5;
  } else if (store) {
    const bool narrow = v.dtype != kRopeF32 && key->vector < 8, usual = regular ? key->lanes >= 8 : !whole;
    warps = narrow ? 2 : v.cache_dtype == v.dtype && usual ? 6 : 3;
    if (narrow) in_flight = 3;
  } else if (regular && key->lanes <= 4 && key->rotary_dim != key->head_dim) {  // a small part of larger heads
    warps = warps_for(v.norm ? 4 : 3, 10);
    in_flight = 3;
    resident = v.norm ? 1 : 0;
  } else if (v.norm) {
    const bool wide = whole && !regular && per_warp <= 2;  // heads of 144 to 240
    warps = key->flat || wide ? 2 : warps_for(2, std::max<int64_t>(2, whole ? 24 / per_warp : 10));
    in_flight = wide ? 3 : table && regular && key->lanes >= 8 ? 1 : 2;
  } else if (regular && key->lanes == 8) {
    warps = std::clamp<int64_t>(heads / 6, 2, 10);  // one turn and a half
    in_flight = 1;
    resident = 40;
  } else if (regular && key->lanes > 8 && table) {
    warps = warps_for(per_warp == 1 ? 1 : 2, 10);
    in_flight = 1;
    resident = 40;
  } else {
    warps = warps_for(2, std::max<int64_t>(2, whole && regular ? 24 / per_warp : 10));
    resident = regular || key->flat ? 0 : 40;
  }
  constexpr int64_t kSharedBytes = 48 * 1024;
  while (warps > 1 && warps * stage_bytes > kSharedBytes) warps /= 2;
  in_flight = std::min(in_flight, Ceil(all_heads, warps * per_warp));  // no more than there are turns
  in_flight = std::clamp<int64_t>(kSharedBytes / (warps * stage_bytes), 0, in_flight);
  key->threads = static_cast<uint16_t>(warps * 32);
  key->in_flight = static_cast<uint8_t>(in_flight);
  return resident;
}

// How many blocks a multiprocessor is to hold at least, which limits registers: for `resident` warps where that was
// searched for, else 1, with which nothing spills. With 0 the compiler chooses, and spills a few bytes of some kernels
// for the sake of occupancy.
int MinBlocks(const RopeCudaKey& key, const CudaDevice& device, int64_t rows, int resident) {
  const RopeVariant& v = key.variant;
  const int warps = key.threads / 32;
  const bool table = v.table_dtype != kRopeNoDtype, partial = key.rotary_dim != key.head_dim;
  const bool usual = v.rounding == kRopeRoundFused && !v.out_of_place && key.q_heads != 0 &&
                     key.rotary_dim == 2 * key.vector * key.lanes;
  if (!usual || key.few_tokens || v.dtype == kRopeF32 || key.vector < 6) return 1;
  if (resident == 0) {
    const bool spills = (key.flat && rows < 3072) || (partial && table && v.table_dtype != kRopeF32) ||
                        (v.norm && table && (partial || v.axes));
    return device.major == 9 && !spills ? 0 : 1;
  }
  if (partial || (table && key.table_vector == 1 && key.vector == 8)) return 1;
  return std::clamp(resident / warps, 1, key.vector == 8 ? 16 : MostCudaBlocks(device));
}

}  // namespace

Status PlanRopeCuda(const RopeCall& call, const CudaDevice& device, RopeCudaOptions options, RopeCudaPlan* plan) {
  // The kernel of rope.cuh writes k wherever it stores it.
  if (call.variant.store_k == kRopeStoreOnly)
    return Status::Unavailable("rope: k_store_only is not served on CUDA yet");
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const RopeTensors& t = call.tensors;
  *plan = {};
  const int64_t rows = p.batch * p.tokens;
  const int64_t heads = int64_t{p.q_heads} + (t.k ? p.k_heads : 0);
  const int64_t all_heads = heads + (v.store_v ? p.k_heads : 0);
  if (rows == 0 || all_heads == 0) return {};
  if (rows > INT32_MAX) {
    return Status::Invalid(Text("rope: q must have fewer than 2^31 tokens on a GPU, but has ", rows));
  }

  RopeCudaKey& key = plan->key;
  key.variant = v;
  key.head_dim = static_cast<uint16_t>(p.head_dim);
  key.rotary_dim = static_cast<uint16_t>(p.rotary_dim);
  key.rotary_offset = static_cast<uint16_t>(p.rotary_offset);
  key.v_dim = static_cast<uint16_t>(v.store_v ? p.v_dim : 0);

  const int bytes = RopeDtypeBytes(v.dtype);
  int vector = ChooseVector(call, 16);

  // Few tokens: narrow accesses and so many threads, every load issued at once. Many tokens: wide accesses, several
  // heads of a group on their way through shared memory.
  const int64_t bytes_moved = rows * heads * p.head_dim * bytes;
  const int64_t few_bytes = int64_t{device.sm_count} * 24 * 1024;
  const bool few =
      options.layout == RopeCudaLayout::kAny ? bytes_moved <= few_bytes : options.layout == RopeCudaLayout::kFew;
  key.few_tokens = few;
  const FewShape shape = PlanFew(v, bytes_moved / device.sm_count);
  if (few) vector = std::min(vector, std::max(1, shape.bytes / bytes));
  // The next kernel of the stream may take its place beside this one where all blocks of this one have theirs at once,
  // and where the last of many leave room; in between it would crowd them.
  if (options.dependent_launch && device.major >= 9) key.dependent_launch = few || rows >= 3072 ? 2 : 1;
  const int odd = few ? 0 : OddVector(call, rows);
  if (odd) vector = odd;
  const int units = p.rotary_dim / (2 * vector);
  const bool rest_matters = v.norm || v.out_of_place || v.store_k;
  const int rest = rest_matters ? (p.head_dim - p.rotary_dim) / vector : 0;
  // A thread for each unit; more where the rest of a head would fill a thread's registers.
  auto lanes = static_cast<int>(Ceil(units, Ceil(units, 32)));
  while (lanes < 32 && Ceil(rest, lanes) > 4) lanes = std::min(32, 2 * lanes);
  const int per_warp = 32 / lanes;
  int resident = 0;
  key.vector = static_cast<uint8_t>(vector);
  key.lanes = static_cast<uint8_t>(lanes);
  if (few) {
    const bool v_rides = !v.store_v || p.v_dim == p.rotary_dim;
    key.in_flight = static_cast<uint8_t>(Ceil(units, lanes) <= 2 && v_rides ? shape.heads : 1);
    // About so many warps a block that none is without a head; no more blocks than those leave heads for.
    const int64_t warps = Ceil(all_heads, per_warp * key.in_flight);
    const int64_t block_warps = Ceil(warps, std::max<int64_t>(1, (warps + shape.warps / 2) / shape.warps));
    key.threads = static_cast<uint16_t>(block_warps * 32);
    plan->grid_y = static_cast<uint32_t>(Ceil(warps, block_warps));
    plan->why = "few tokens: the heads of a token are spread over blocks";
  } else {
    const int span = rest_matters ? p.head_dim : p.rotary_dim;
    // Halves that do not fill sectors of 32 bytes are fetched side by side.
    key.flat =
        odd || (vector * bytes == 16 && (p.rotary_dim / 2 * bytes % 32 != 0 || p.rotary_offset * bytes % 32 != 0));
    const int64_t slots = 2 * Ceil(units, lanes) + Ceil(rest, lanes);
    const int64_t stage_bytes = key.flat ? per_warp * span * bytes : slots * 32 * vector * bytes;
    if (odd) {
      PlanOdd(all_heads, per_warp, p.head_dim * bytes, &key);
    } else {
      resident = PlanMany(v, rows, heads, all_heads, per_warp, stage_bytes, &key);
    }
    if (key.in_flight == 0) key.flat = 0;
    plan->why = "many tokens: a block for each token";
  }
  plan->grid_x = static_cast<uint32_t>(rows);
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
    // Told by the strides: that a single token's k happens to follow its q must compile nothing.
    key.packed =
        t.k && p.tokens > 1 && key.k_token == key.q_token && p.k.batch == p.q.batch &&
        key.q_token >= (p.q_heads + p.k_heads) * p.head_dim &&
        static_cast<const char*>(t.k) == static_cast<const char*>(t.q) + int64_t{p.q_heads} * p.head_dim * bytes;
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
        static_cast<const char*>(t.v) == static_cast<const char*>(t.q) + behind * bytes) {
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

  key.table_vector = 1;
  if (v.table_dtype != kRopeNoDtype && p.cos_pair == 1 && p.sin_pair == 1) {
    const int table_bytes = RopeDtypeBytes(v.table_dtype);
    int table_vector = 16 / table_bytes;
    // A run of pairs begins at a multiple of the vector, or of half of it where neighbours share one; and an axis may
    // end anywhere.
    const bool halved = v.pairing == ROPEWALK_INTERLEAVED && vector > 1 && (!key.flat || vector % 8 == 0);
    const int run = halved ? vector / 2 : vector;
    table_vector = std::min(table_vector, run);
    if (halved) {
      while (table_vector > 1 && (p.rotary_dim / 4) % table_vector) table_vector /= 2;
    }
    while (table_vector > 1 && run % table_vector) table_vector /= 2;
    table_vector = Alignment(table_vector, t.cos, table_bytes, {p.cos_batch, p.cos_row});
    table_vector = Alignment(table_vector, t.sin, table_bytes, {p.sin_batch, p.sin_row});
    key.table_vector = static_cast<uint8_t>(v.axes ? 1 : table_vector);
  }
  if (odd) resident = OddWarps(key);
  key.min_blocks = static_cast<uint8_t>(MinBlocks(key, device, rows, resident));
  return {};
}

std::string RopeCudaSource(const RopeCudaKey& key) {
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
      {"StoreK", v.store_k},
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
  };
  std::string text = "#include \"ops/rope/rope.cuh\"\nstruct K {\n";
  for (const auto& [name, value] : constants)
    Append(&text, Text("  static constexpr int k", name, " = ", value, ";\n"));
  Append(&text, Text("  static constexpr unsigned kEpsBits = ", std::bit_cast<uint32_t>(key.eps), "u;\n"));
  return text + "};\nextern \"C\" __global__ void __launch_bounds__(K::kThreads" +
         (key.min_blocks ? Text(", ", key.min_blocks) : Text()) +
         ") rope_kernel(const __grid_constant__ rope_cuda_args args) {\n  ropewalk::RopeBody<K>(args);\n}\n";
}

std::string RopeCudaName(const RopeCudaKey& key) {
  constexpr const char* kDtypes[] = {"", "float32", "float16", "bfloat16", "e4m3", "e5m2", "int32", "int64"};
  const RopeVariant& v = key.variant;
  std::string name = Text(kDtypes[v.dtype], v.pairing ? " interleaved" : " neox", v.inverse ? " inverse" : "");
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
    Append(&name, Text(" store", v.store_k ? "_k" : "", v.store_v ? "_v" : "", ":", kDtypes[v.cache_dtype],
                       " slots:", kDtypes[v.slots_dtype], v.store_v ? Text(" v", key.v_dim) : ""));
  }
  if (v.out_of_place) name += " out";
  return Text(name, " d", key.head_dim, " r", key.rotary_dim, key.rotary_offset ? Text("@", key.rotary_offset) : "",
              key.q_heads ? Text(" h", key.q_heads, "/", key.k_heads) : Text(), key.few_tokens ? " few" : " many", " v",
              key.vector, " l", key.lanes, " x", key.in_flight, " t", key.threads, key.dependent_launch ? " pdl" : "");
}

}  // namespace ropewalk
