// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/shapes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <tuple>

#include "backends/cuda/cost.h"

namespace ropewalk {
namespace {

// The odd vector of a call, 6 or 10 elements, or 0 if vectors of 16 bytes are best. Odd vectors pay for heads with a
// norm whose halves are not 1, 2, 4, .. vectors of 16 bytes: fewer threads idle, and more heads share a warp
// (docs/cuda.md).
int OddVector(const RopeCall& call, int64_t rows) {
  const int half = call.params.rotary_dim / 2;
  if (rows < 3072) return 0;
  if (half % 8 == 0 && std::has_single_bit(static_cast<unsigned>(half / 8))) return 0;
  const auto fits = [&](int vector) {
    return FlatVectorFits(call, vector) && std::has_single_bit(static_cast<unsigned>(half / vector));
  };
  if (fits(10) && call.variant.table_dtype == kRopeNoDtype)
    return 10;  // a table's entries take registers that it lacks
  return fits(6) || (half % 8 != 0 && FlatVectorFits(call, 6) && half / 6 <= 16) ? 6 : 0;
}

// The shape of a block with odd vectors: how many turns a warp takes, and how many of them are on their way at once.
RopeCudaShape OddShape(const RopeVariant& v, const HeadDeal& deal, int64_t heads) {
  const bool regular = deal.regular(), store = Stores(v);
  RopeCudaShape shape;
  shape.vector = static_cast<uint8_t>(deal.vector);
  // Else the heads of a warp end within a sector: two rounds of them do not.
  shape.flat = regular ? 1 : 2;
  const int64_t stages = Ceil(heads, deal.per_warp() * shape.flat);
  const int64_t turns = store && regular ? 3 : store || regular ? 5 : 1, most = store && regular ? 2 : 3;
  const int64_t warps = std::min<int64_t>(Ceil(stages, turns), 8);
  shape.cut = static_cast<uint8_t>(std::min<int64_t>(Ceil(stages, warps), 255));
  shape.in_flight = static_cast<uint8_t>(std::min<int64_t>(shape.cut, most));
  return shape;
}

// Few tokens. Searched on an H200 (docs/cuda.md): first latency decides, then the number of instructions.
RopeCudaShape FewShape(const RopeVariant& v, int64_t bytes_per_multiprocessor) {
  const auto shape = [&](int access_bytes, int warps, int heads) {
    RopeCudaShape s;
    s.few = 1;
    s.vector = static_cast<uint8_t>(std::max(1, access_bytes / RopeDtypeBytes(v.dtype)));
    s.cut = static_cast<uint8_t>(warps);
    s.in_flight = static_cast<uint8_t>(heads);
    // Where the position comes before all else, as for a table, the next kernel starts when it has come; else when the
    // loads are issued. The other way round takes 5 to 17 % longer at one token.
    s.start = v.table_dtype != kRopeNoDtype || Stores(v) ? 2 : 3;
    return s;
  };
  if (bytes_per_multiprocessor <= 512) return shape(4, 4, 1);
  if (bytes_per_multiprocessor <= 6 * 1024) {
    if (StoresFp8(v)) return shape(8, 4, 1);
    return Stores(v) && bytes_per_multiprocessor > 5 * 512 ? shape(4, 6, 1) : shape(4, 4, 2);
  }
  if (Stores(v)) return shape(8, 12, 2);
  if (v.table_dtype != kRopeNoDtype) return shape(8, 10, 1);
  return v.norm ? shape(8, 5, 2) : shape(4, 10, 2);
}

// Many tokens, a block for each. Searched on an H200 (docs/cuda.md): the more tokens, the less there is to gain from
// many loads of one, and the more from many blocks of a multiprocessor.
RopeCudaShape ManyShape(const RopeCall& call, const HeadDeal& deal, bool flat, int64_t rows, int64_t heads,
                        int64_t all_heads) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const bool store = Stores(v), table = v.table_dtype != kRopeNoDtype;
  const bool whole = v.dtype != kRopeF32 && deal.vector == 8;  // accesses of 16 bytes
  const bool regular = whole && deal.regular();
  const int64_t per_warp = deal.per_warp();
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
    const bool narrow = v.dtype != kRopeF32 && deal.vector < 8, usual = regular ? deal.lanes >= 8 : !whole;
    warps = narrow ? 2 : v.cache_dtype == v.dtype && usual ? 6 : 3;
    if (narrow) in_flight = 3;
  } else if (regular && deal.lanes <= 4 && p.rotary_dim != p.head_dim) {  // a small part of larger heads
    warps = warps_for(v.norm ? 4 : 3, 10);
    in_flight = 3;
    resident = v.norm ? 1 : 0;
  } else if (v.norm) {
    const bool wide = whole && !regular && per_warp <= 2;  // heads of 144 to 240
    warps = flat || wide ? 2 : warps_for(2, std::max<int64_t>(2, whole ? 24 / per_warp : 10));
    in_flight = wide ? 3 : table && regular && deal.lanes >= 8 ? 1 : 2;
  } else if (regular && deal.lanes == 8) {
    warps = std::clamp<int64_t>(heads / 6, 2, 10);  // one turn and a half
    in_flight = 1;
    resident = 40;
  } else if (regular && deal.lanes > 8 && table) {
    warps = warps_for(per_warp == 1 ? 1 : 2, 10);
    in_flight = 1;
    resident = 40;
  } else {
    warps = warps_for(2, std::max<int64_t>(2, whole && regular ? 24 / per_warp : 10));
    resident = regular || flat ? 0 : 40;
  }
  RopeCudaShape shape;
  shape.vector = static_cast<uint8_t>(deal.vector);
  shape.flat = flat;
  shape.cut = static_cast<uint8_t>(std::min<int64_t>(Ceil(Ceil(all_heads, per_warp), warps), 255));
  shape.in_flight = static_cast<uint8_t>(in_flight);
  shape.resident = static_cast<uint8_t>(resident);
  return shape;
}

}  // namespace

int PlainVector(const RopeCall& call, int wanted) {
  const int widest = ChooseVector(call, 16);
  return wanted > 0 ? std::min(widest, static_cast<int>(std::bit_floor(static_cast<unsigned>(wanted)))) : widest;
}

bool FlatVectorFits(const RopeCall& call, int vector) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const int half = p.rotary_dim / 2;
  return vector > 0 && vector <= 14 && vector % 2 == 0 && half % vector == 0 && half / vector <= 32 && v.norm &&
         !v.out_of_place && p.rotary_dim == p.head_dim && (!v.store_v || p.v_dim == p.head_dim) &&
         v.rounding == kRopeRoundFused && RopeDtypeBytes(v.dtype) == 2 && RopeDtypeBytes(v.weight_dtype) == 2 &&
         ChooseVector(call, 16, true) == 8;
}

HeadDeal DealHead(const RopeCall& call, int vector, int share) {
  constexpr int kMostShare = 8;  // more than a thread's registers hold
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  HeadDeal deal;
  deal.vector = vector;
  deal.units = p.rotary_dim / (2 * vector);
  deal.rest = v.norm || v.out_of_place || v.store_k ? (p.head_dim - p.rotary_dim) / vector : 0;
  // A thread for each unit; more where the rest of a head would fill a thread's registers.
  deal.lanes = static_cast<int>(Ceil(deal.units, Ceil(deal.units, 32)));
  if (share > 1 && share <= kMostShare && deal.units % share == 0)
    deal.lanes = std::min(deal.lanes, deal.units / share);
  while (deal.lanes < 32 && Ceil(deal.rest, deal.lanes) > 4) deal.lanes = std::min(32, 2 * deal.lanes);
  return deal;
}

namespace {

// Of q and k. Of 2^31 tokens and as many heads the product is more than 64 bits hold.
double BytesOfMultiprocessor(const RopeCall& call, const CudaDevice& device) {
  const rope_params& p = call.params;
  const double heads = static_cast<double>(HeadsOf(call).heads) * p.head_dim * RopeDtypeBytes(call.variant.dtype);
  return static_cast<double>(p.batch * p.tokens) * heads / std::max(device.sm_count, 1);
}

}  // namespace

bool RopeCudaShapeSuits(const RopeCall& call, const CudaDevice& device, const RopeCudaShape& shape) {
  return shape.few      ? BytesOfMultiprocessor(call, device) <= 160 * 1024
         : shape.vector ? FlatVectorFits(call, shape.vector)
                        : BytesOfMultiprocessor(call, device) >= 4 * 1024;
}

RopeCudaFeatures FeaturesOf(const RopeCall& call, const CudaDevice& device) {
  const RopeVariant& v = call.variant;
  const int64_t rows = call.params.batch * call.params.tokens;
  const HeadDeal deal = DealHead(call, PlainVector(call, 0));
  const auto log2 = [](double x) { return static_cast<float>(std::log2(std::max(x, 1e-3))); };
  RopeCudaFeatures f;
  f.norm = v.norm;
  f.table = v.table_dtype != kRopeNoDtype;
  f.store = StoreKind(v);
  f.regular = deal.regular();
  f.lanes = log2(deal.lanes);
  f.bytes = log2(BytesOfMultiprocessor(call, device));
  f.turns = log2(static_cast<double>(HeadsOf(call).all) / deal.per_warp());
  f.tokens = log2(static_cast<double>(rows) * kH200Multiprocessors / std::max(device.sm_count, 1));
  return f;
}

namespace {

// How unlike two calls are, for their shapes: a unit is about a factor of two in the bytes. A store's work is another
// one than that without; heads of no power of two have their own vectors.
float Distance(const RopeCudaFeatures& a, const RopeCudaFeatures& b) {
  const auto square = [](float x) { return x * x; };
  float sum = square(a.bytes - b.bytes) + square(0.6f * (a.turns - b.turns)) + square(0.3f * (a.tokens - b.tokens)) +
              square(0.8f * (a.lanes - b.lanes));
  if (a.norm != b.norm) sum += square(1.0f);
  if (a.table != b.table) sum += square(0.7f);
  if (a.store != b.store) sum += square(a.store && b.store ? 0.5f : 2.5f);
  if (a.regular != b.regular) sum += square(3.0f);
  return sum;
}

using Entry = RopeCudaTuned::Entry;

// Calls that were searched on an H200, and their shapes. They serve the very same calls and no others: what is best for
// a neighbour, even a close one, is on average no better than what the model says. 12 bytes each, as there are
// thousands.
struct Listed {
  constexpr Listed(uint16_t rows, uint8_t head_quarters, uint8_t rotary_quarters, uint8_t q, uint8_t k, uint8_t which,
                   const RopeCudaShape& s = {})
      : tokens(rows), head(head_quarters), rotary(rotary_quarters), q_heads(q), k_heads(k), stages(which) {
    if (s.few > 1 || s.vector > 15 || s.in_flight > 15 || s.flat > 15 || s.cut > 31 || s.warp_tokens > 7 ||
        s.tokens > 31 || s.resident > 127 || s.share > 7 || s.start > 3) {
      throw "a number of a shape takes more bits";  // ends the compilation
    }
    packed[0] = static_cast<uint8_t>(s.few | s.vector << 1 | s.share << 5);
    packed[1] = static_cast<uint8_t>(s.in_flight | s.flat << 4);
    packed[2] = static_cast<uint8_t>(s.cut | s.warp_tokens << 5);
    packed[3] = static_cast<uint8_t>(s.tokens | s.start << 5);
    packed[4] = s.resident;
  }

  constexpr auto key() const { return std::tie(tokens, head, rotary, q_heads, k_heads, stages); }
  RopeCudaShape shape() const {
    const auto bits = [&](int byte, int from, int count) {
      return static_cast<uint8_t>(packed[byte] >> from & ((1 << count) - 1));
    };
    return {bits(0, 0, 1), bits(0, 1, 4), bits(1, 0, 4), bits(1, 4, 4), bits(2, 0, 5),
            bits(2, 5, 3), bits(3, 0, 5), bits(4, 0, 7), bits(0, 5, 3), bits(3, 5, 2)};
  }

  uint16_t tokens;
  uint8_t head, rotary;  // a fourth of the elements of a head, and of its rotated part
  uint8_t q_heads, k_heads, stages;
  uint8_t packed[5] = {};  // the shape
};
constexpr Listed kTable[] = {
#include "backends/cuda/shapes_table.inc"
};

static_assert(sizeof(Listed) == 12 && std::ranges::is_sorted(kTable, {}, &Listed::key));

std::optional<RopeCudaShape> FindListed(const RopeCall& call) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const int64_t rows = p.batch * p.tokens, k_heads = call.tensors.k ? p.k_heads : 0;
  const bool whole_store = v.store_k && v.store_v && p.v_dim == p.head_dim;
  if (rows > UINT16_MAX || std::max<int64_t>({p.head_dim / 4, p.q_heads, k_heads}) > UINT8_MAX || p.head_dim % 4 != 0 ||
      p.rotary_dim % 4 != 0 || RopeDtypeBytes(v.dtype) != 2 || p.rotary_offset != 0 || (Stores(v) && !whole_store)) {
    return std::nullopt;
  }
  const auto quarter = [](int64_t elements) { return static_cast<uint8_t>(elements / 4); };
  Listed wanted(static_cast<uint16_t>(rows), quarter(p.head_dim), quarter(p.rotary_dim),
                static_cast<uint8_t>(p.q_heads), static_cast<uint8_t>(k_heads),
                static_cast<uint8_t>(v.norm + 2 * (v.table_dtype != kRopeNoDtype) + 4 * StoreKind(v)));
  const auto find = [&]() -> std::optional<RopeCudaShape> {
    const auto found = std::ranges::lower_bound(kTable, wanted.key(), {}, &Listed::key);
    if (found == std::end(kTable) || found->key() != wanted.key()) return std::nullopt;
    return found->shape();
  };
  const std::optional<RopeCudaShape> shape = find();
  if (shape || !StoresKOnly(v)) return shape;
  wanted.stages = static_cast<uint8_t>(wanted.stages - 8);  // as with k in both places, unless a search found otherwise
  return find();
}

// The entry for the call most like this one; null if there is none. *distance: how unlike it is, at most as it was.
const Entry* Nearest(std::span<const Entry> entries, const RopeCudaFeatures& features, float* distance) {
  const Entry* nearest = nullptr;
  for (const Entry& entry : entries) {
    const float bytes = entry.features.bytes - features.bytes;
    if (bytes * bytes >= *distance) continue;  // mostly the bytes alone rule an entry out
    const float other = Distance(entry.features, features);
    if (other >= *distance) continue;
    nearest = &entry;
    *distance = other;
  }
  return nearest;
}

constexpr float kNear = 0.0625f;  // what a search found here serves calls within a quarter of an octave

// Shapes that are the best of some call, or close to it, by how many calls they serve.
constexpr RopeCudaShape kCandidates[] = {
#include "backends/cuda/shapes_candidates.inc"
};

// The candidates' accesses are of elements of two bytes.
RopeCudaShape OfElements(RopeCudaShape shape, const RopeCall& call) {
  if (shape.few) {
    shape.vector = static_cast<uint8_t>(std::max(1, shape.vector * 2 / RopeDtypeBytes(call.variant.dtype)));
  }
  return shape;
}

// Calls visit(shape) for the candidates that a call can have.
template <class Visit>
void ForCandidates(const RopeCall& call, const CudaDevice& device, const Visit& visit) {
  const auto widest = static_cast<uint8_t>(PlainVector(call, 0));
  for (const RopeCudaShape& candidate : kCandidates) {
    RopeCudaShape shape = OfElements(candidate, call);
    if (shape.few) shape.vector = std::min(shape.vector, widest);
    if (RopeCudaShapeSuits(call, device, shape)) visit(shape);
  }
}

constexpr int64_t kLeastTokens = 3;    // below, latency alone decides
constexpr int64_t kMostTokens = 8192;  // more differ in nothing but their number

// The candidate and the start of the next kernel that the model holds to be the fastest. Candidates are sorted by how
// many calls they serve: one that serves fewer, or another start than the usual one, has to be better by so much, as
// each is a kernel to compile.
RopeCudaShape ModelledShape(const RopeCall& call, const CudaDevice& device) {
  constexpr float kRarer = 0.003f, kOtherStart = 0.01f;
  constexpr float kFar = 0.1f;  // too slow for another start to make up
  const int64_t rows = call.params.batch * call.params.tokens;
  const bool table = call.variant.table_dtype != kRopeNoDtype;
  RopeCall cut = call;
  cut.params.tokens = std::min(rows, kMostTokens);
  cut.params.batch = 1;
  RopeCudaShape best;
  float least = std::numeric_limits<float>::max();
  ForCandidates(call, device, [&](const RopeCudaShape& shape) {
    CostInputs inputs = CostInputsOf(cut, device, shape);
    const uint8_t usual = RopeCudaStart(shape, rows, table);
    const auto consider = [&](uint8_t start, float cost, float worth) {
      if (cost >= least - worth) return;
      best = shape;
      best.start = start;
      least = cost;
    };
    const float cost = RopeCudaCost(inputs);
    consider(usual, cost, kRarer);
    if (cost > least + kFar) return;
    for (const uint8_t start : {uint8_t{1}, uint8_t{2}, uint8_t{3}}) {
      if (start == usual) continue;
      SetCostStart(start, &inputs);
      consider(start, RopeCudaCost(inputs), kOtherStart);
    }
  });
  return best;
}

}  // namespace

RopeCudaShape RopeCudaShapeByRules(const RopeCall& call, const CudaDevice& device, RopeCudaLayout layout) {
  const RopeVariant& v = call.variant;
  const rope_params& p = call.params;
  const int64_t rows = p.batch * p.tokens;
  const auto [heads, all_heads] = HeadsOf(call);
  const int bytes = RopeDtypeBytes(v.dtype);
  // Few tokens: narrow accesses and so many threads, every load issued at once. Many tokens: wide accesses, several
  // heads of a group on their way through shared memory.
  const double per_multiprocessor = BytesOfMultiprocessor(call, device);
  const bool few = layout == RopeCudaLayout::kAny ? per_multiprocessor <= 24 * 1024 : layout == RopeCudaLayout::kFew;
  if (few) return FewShape(v, static_cast<int64_t>(per_multiprocessor));
  if (const int odd = OddVector(call, rows)) return OddShape(v, DealHead(call, odd), all_heads);
  const HeadDeal deal = DealHead(call, PlainVector(call, 0));
  // Halves that do not fill sectors of 32 bytes are fetched side by side.
  const bool flat =
      deal.vector * bytes == 16 && (p.rotary_dim / 2 * bytes % 32 != 0 || p.rotary_offset * bytes % 32 != 0);
  return ManyShape(call, deal, flat, rows, heads, all_heads);
}

RopeCudaShape ChooseRopeCudaShape(const RopeCall& call, const CudaDevice& device, RopeCudaLayout layout,
                                  RopeCudaOrigin* origin) {
  *origin = RopeCudaOrigin::kRules;
  if (layout != RopeCudaLayout::kAny) return RopeCudaShapeByRules(call, device, layout);
  if (device.tuned) {
    float distance = kNear;
    if (const Entry* tuned = Nearest(device.tuned->entries, FeaturesOf(call, device), &distance)) {
      *origin = RopeCudaOrigin::kTunedHere;
      return tuned->shape;
    }
  }
  if (device.measured) {
    if (const std::optional<RopeCudaShape> shape = FindListed(call)) {
      *origin = RopeCudaOrigin::kTable;
      return *shape;
    }
  }
  if (call.params.batch * call.params.tokens < kLeastTokens) return RopeCudaShapeByRules(call, device, layout);
  *origin = RopeCudaOrigin::kModel;
  return ModelledShape(call, device);
}

namespace {

void AddNew(const RopeCudaShape& shape, std::vector<RopeCudaShape>* shapes) {
  if (std::ranges::find(*shapes, shape) == shapes->end()) shapes->push_back(shape);
}

}  // namespace

std::vector<RopeCudaShape> RopeCudaChoices(const RopeCall& call, const CudaDevice& device) {
  CudaDevice unlisted = device;
  unlisted.measured = false;
  unlisted.tuned = nullptr;
  RopeCudaOrigin origin;
  std::vector<RopeCudaShape> shapes = {ChooseRopeCudaShape(call, device, RopeCudaLayout::kAny, &origin)};
  AddNew(ChooseRopeCudaShape(call, unlisted, RopeCudaLayout::kAny, &origin), &shapes);
  for (const RopeCudaLayout layout : {RopeCudaLayout::kFew, RopeCudaLayout::kMany}) {
    AddNew(RopeCudaShapeByRules(call, device, layout), &shapes);
  }
  return shapes;
}

std::vector<RopeCudaShape> RopeCudaCandidates(const RopeCall& call, const CudaDevice& device,
                                              const RopeCudaShape* near) {
  std::vector<RopeCudaShape> shapes;
  const auto add = [&](const RopeCudaShape& shape) { AddNew(shape, &shapes); };
  if (near) {
    const auto vary = [&](uint8_t RopeCudaShape::*member, std::initializer_list<int> values) {
      for (const int value : values) {
        RopeCudaShape shape = *near;
        shape.*member = static_cast<uint8_t>(value);
        if (value >= (member == &RopeCudaShape::resident ? 0 : 1) && shape != *near) add(shape);
      }
    };
    vary(&RopeCudaShape::in_flight, {near->in_flight - 1, near->in_flight + 1});
    vary(&RopeCudaShape::cut, {near->cut - 1, near->cut + 1});
    vary(&RopeCudaShape::tokens, {near->tokens / 2, near->tokens * 2});
    vary(&RopeCudaShape::share, {1, 2, 3, 4, 5});
    if (!near->few) vary(&RopeCudaShape::resident, {0, 24, 40});
    vary(&RopeCudaShape::start, {1, 2, 3});
    return shapes;
  }
  shapes = RopeCudaChoices(call, device);
  ForCandidates(call, device, add);
  return shapes;
}

}  // namespace ropewalk
