// The operation: its description, and the rules that a table cannot say.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "base/text.h"
#include "rope/call.h"
#include "rope/known_calls.h"

namespace ropewalk {
namespace {

#define FIELD(name) #name, Kind::kTensor, offsetof(ropewalk_rope_args, name)
#define SCALAR(name, kind) #name, Kind::kind, offsetof(ropewalk_rope_args, name)

// An argument's sentence stands here alone: docs/arguments.md and Python's rope_ have it from here.
// clang-format off
constexpr Arg kArgs[] = {
    {FIELD(q), "rotated in place, unless q_out is given", Intent::kInOut, kFloats, nullptr,
     {Dim::kBatch, Dim::kTokens, Dim::kQHeads, Dim::kHeadDim}, kRequired | kUnitStride | kOptionalBatch},
    {FIELD(k), "rotated in place, unless k_out is given or k_store_only", Intent::kInOut, kFloats, "q",
     {Dim::kBatch, Dim::kTokens, Dim::kKHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(positions), "of each token: of any sign and size with frequencies, else a row of the table. None: 0, 1, 2 "
     "and so on",
     Intent::kIn, kInts, nullptr, {Dim::kAxes, Dim::kBatch, Dim::kTokens}, kOptionalAxes | kOptionalBatch | kBroadcast},
    {FIELD(offsets), "added to positions", Intent::kIn, kInts, nullptr, {Dim::kBatch, Dim::kTokens},
     kOptionalBatch | kBroadcast},
    {SCALAR(frequencies, kHandle), "a Frequencies: angles are computed, exact at every position. Or a table is given "
     "instead: cos and sin, or cos_sin"},
    {FIELD(cos), "table of cosines, used as it is", Intent::kIn, kFloats, nullptr,
     {Dim::kBatch, Dim::kRows, Dim::kPairs}, kOptionalBatch | kBroadcast},
    {FIELD(sin), "table of sines", Intent::kIn, kFloats, "cos", {Dim::kBatch, Dim::kRows, Dim::kPairs},
     kOptionalBatch | kBroadcast},
    {FIELD(cos_sin), "a table in one, instead of cos and sin: cosines, then sines", Intent::kIn, kFloats, nullptr,
     {Dim::kBatch, Dim::kRows, Dim::kRotaryDim}, kOptionalBatch | kBroadcast},
    {FIELD(axes), "the row of positions that each pair takes (mrope, 2-D and 3-D rope)", Intent::kIn, kI32, nullptr,
     {Dim::kPairs}, kUnitStride},
    {.name = "pairing", .kind = Kind::kChoice, .offset = offsetof(ropewalk_rope_args, pairing),
     .doc = "which elements form a pair: i and i + rotary_dim/2 (neox), or 2i and 2i + 1 (interleaved)",
     .choices = {"neox", "interleaved"}, .default_text = "\"neox\""},
    {.name = "rotary_dim", .kind = Kind::kInt, .offset = offsetof(ropewalk_rope_args, rotary_dim),
     .doc = "how many elements of a head are rotated. None (0 in C): as many as frequencies or the table say"},
    {.name = "rotary_offset", .kind = Kind::kInt, .offset = offsetof(ropewalk_rope_args, rotary_offset),
     .doc = "where the rotated part begins in the head", .default_text = "0"},
    {.name = "inverse", .kind = Kind::kBool, .offset = offsetof(ropewalk_rope_args, inverse),
     .doc = "turn by the negative angles. An attention scaling s multiplies both ways: there and back is s * s * x",
     .default_text = "False"},
    {.name = "norm", .kind = Kind::kChoice, .offset = offsetof(ropewalk_rope_args, norm),
     .doc = "\"rms\": before the rotation each head is divided by the root of its mean square + eps (Zhang and "
            "Sennrich, \"Root Mean Square Layer Normalization\", 2019). A weight given means rms",
     .choices = {"none", "rms"}, .default_text = "None"},
    {FIELD(q_weight), "multiplies the normalised heads of q",
     Intent::kIn, kFloats, nullptr, {Dim::kHeadDim}, kUnitStride},
    {FIELD(k_weight), "multiplies the normalised heads of k",
     Intent::kIn, kFloats, "q_weight", {Dim::kHeadDim}, kUnitStride},
    {.name = "zero_centered_weight", .kind = Kind::kBool, .offset = offsetof(ropewalk_rope_args, zero_centered_weight),
     .doc = "multiply by 1 + weight (Gemma)", .default_text = "False"},
    {.name = "eps", .kind = Kind::kDouble, .offset = offsetof(ropewalk_rope_args, eps),
     .doc = "added to the mean square of the norm", .default_text = "1e-6"},
    {.name = "rounding", .kind = Kind::kChoice, .offset = offsetof(ropewalk_rope_args, rounding),
     .doc = "to q's dtype once at the end (fused), or after each operation that rounds in transformers (reference)",
     .choices = {"fused", "reference"}, .default_text = "\"fused\""},
    {FIELD(q_out), "written instead of q", Intent::kOut, kFloats, "q",
     {Dim::kBatch, Dim::kTokens, Dim::kQHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(k_out), "written instead of k", Intent::kOut, kFloats, "q",
     {Dim::kBatch, Dim::kTokens, Dim::kKHeads, Dim::kHeadDim}, kUnitStride | kOptionalBatch},
    {FIELD(v), "only stored in v_cache", Intent::kIn, kFloats, "q",
     {Dim::kBatch, Dim::kTokens, Dim::kKHeads, Dim::kVDim}, kUnitStride | kOptionalBatch},
    {FIELD(k_cache), "takes the rotated k; any strides (NHD, HND, flat)", Intent::kInOut, kFloats | kFp8, "q",
     {Dim::kPages, Dim::kPageSize, Dim::kKHeads, Dim::kHeadDim}, kUnitStride | kOptionalPages},
    {FIELD(v_cache), "takes v", Intent::kInOut, kFloats | kFp8, "q",
     {Dim::kPages, Dim::kPageSize, Dim::kKHeads, Dim::kVDim}, kUnitStride | kOptionalPages},
    {FIELD(slots), "where each token goes in the caches: page * page_size + place. Negative: not stored", Intent::kIn,
     kInts, nullptr, {Dim::kBatch, Dim::kTokens}, kOptionalBatch},
    {FIELD(k_scale), "a number, or one for each head: an fp8 k_cache holds k / k_scale",
     Intent::kIn, kF32, nullptr, {Dim::kKHeads}, kBroadcast | kHostScalar},
    {FIELD(v_scale), "a number, or one for each head: an fp8 v_cache holds v / v_scale",
     Intent::kIn, kF32, nullptr, {Dim::kKHeads}, kBroadcast | kHostScalar},
    {SCALAR(sycl_queue, kQueue), "for tensors in SYCL's unified shared memory (Intel GPUs), the queue to work on: a "
     "dpctl.SyclQueue, a torch.xpu.Stream or the address of a sycl::queue. None: torch's current one"},
    {.name = "disable_pdl", .kind = Kind::kBool, .offset = offsetof(ropewalk_rope_args, disable_pdl),
     .doc = "on NVIDIA GPUs from sm_90 on, do not let the kernel begin before the one before it in the stream has "
            "ended (programmatic dependent launch); it reads nothing before that in either case", .default_text = "False"},
    {.name = "k_store_only", .kind = Kind::kBool, .offset = offsetof(ropewalk_rope_args, k_store_only),
     .doc = "k goes to k_cache alone, and its own memory is only read: for callers that read k from the cache. 8 % "
            "fewer bytes at 32/8 heads with a store of k and v, 14 % at 32/32", .default_text = "False"},
};
// clang-format on

static_assert(std::ranges::count(kArgs, Kind::kTensor, &Arg::kind) <= KnownCalls::Known::kMostTensors,
              "known calls keep every tensor");
static_assert(std::ranges::count_if(kArgs, [](const Arg& arg) { return arg.flags & kHostScalar; }) <= kMostHostScalars,
              "bindings keep every value on the host");

consteval size_t Index(std::string_view name) {
  for (size_t i = 0; i < std::size(kArgs); ++i) {
    if (kArgs[i].name == name) return i;
  }
  throw "no argument of that name";  // a consteval function cannot: a compile error
}

uint8_t Constant(const DLTensor* tensor) {
  if (!tensor) return kRopeNoDtype;
  switch (DtypeOf(tensor->dtype)) {
    case kF32: return kRopeF32;
    case kF16: return kRopeF16;
    case kBF16: return kRopeBF16;
    case kE4M3: return kRopeE4M3;
    case kE5M2: return kRopeE5M2;
    case kI32: return kRopeI32;
    case kI64: return kRopeI64;
    default: return kRopeNoDtype;
  }
}

// Kernels multiply by a scale's inverse, which must be finite too.
constexpr float kLeastScale = std::numeric_limits<float>::min(), kMostScale = std::numeric_limits<float>::max();

float ScaleAt(const DLTensor& tensor, int64_t i) {
  return static_cast<const float*>(DataOf(tensor))[tensor.ndim == 0 ? 0 : i * StrideOf(tensor, 0)];
}

template <class... Parts>
Status Invalid(const Parts&... parts) {
  return Status::Invalid(Text("rope: ", parts...));
}

// Which arguments go together.
Status CheckCombination(const ropewalk_rope_args& a) {
  if (a.cos_sin && (a.cos || a.sin))
    return Invalid("cos_sin is given together with ", a.cos ? "cos" : "sin", ": give cos_sin, or cos and sin");
  if (!a.cos != !a.sin) return Invalid(a.cos ? "sin" : "cos", " is missing: cos and sin go together");
  const bool table = a.cos || a.cos_sin;
  if (table && a.frequencies)
    return Invalid("frequencies and ", a.cos ? "cos" : "cos_sin", " are both given: angles come from one of them");
  if (!table && !a.frequencies) return Invalid("frequencies are missing: give frequencies, or cos and sin, or cos_sin");
  if (!a.k) {
    const char* needs_k = a.k_out ? "k_out" : a.k_weight ? "k_weight" : a.k_cache ? "k_cache" : nullptr;
    if (needs_k) return Invalid(needs_k, " is given, but k is missing");
  }
  if (a.k_store_only) {
    const char* needed = !a.k ? "k" : !a.k_cache ? "k_cache" : nullptr;
    if (needed)
      return Invalid("k_store_only is 1, but ", needed, " is missing: k is stored in k_cache and nowhere else");
    if (a.k_out) return Invalid("k_store_only is 1, but k_out is given: k goes to k_cache alone");
  }
  if (a.k_weight && !a.q_weight) return Invalid("q_weight is missing, but k_weight is given: give both or neither");
  if (a.q_weight && a.k && !a.k_weight) {
    return Invalid("k_weight is missing, but q_weight is given, and k is normalised too: give both or neither");
  }
  if (a.zero_centered_weight && !a.q_weight) return Invalid("zero_centered_weight is given, but q_weight is missing");
  if (!a.v != !a.v_cache)
    return Invalid(a.v ? "v_cache is missing, but v is given: v is only stored" : "v is missing, but v_cache is given");
  const bool store = a.k_cache || a.v_cache;
  if (store && !a.slots) return Invalid("slots are missing, but ", a.k_cache ? "k_cache" : "v_cache", " is given");
  if (!store && a.slots) return Invalid("slots are given, but k_cache and v_cache are missing");
  const auto fp8 = [](const DLTensor* cache) { return cache && (DtypeOf(cache->dtype) & kFp8); };
  if (a.k_scale && !fp8(a.k_cache)) return Invalid("k_scale is given, but k_cache is not an fp8 cache");
  if (a.v_scale && !fp8(a.v_cache)) return Invalid("v_scale is given, but v_cache is not an fp8 cache");
  if (a.k_cache && a.v_cache && Constant(a.k_cache) != Constant(a.v_cache)) {
    return Invalid("v_cache must be ", DtypeName(a.k_cache->dtype), " like k_cache, but is ",
                   DtypeName(a.v_cache->dtype));
  }
  return {};
}

// What is rotated: rotary_dim, from the argument, the frequencies or the table.
Status FindRotaryDim(const ropewalk_rope_args& a, const Sizes& sizes, int64_t* rotary_dim) {
  const int64_t head_dim = sizes[Dim::kHeadDim];
  if (head_dim % 2 != 0 || head_dim < 2 || head_dim > 8192) {
    return Invalid("q must have an even head_dim from 2 to 8192, but has head_dim ", head_dim);
  }
  const char* source = a.frequencies ? "frequencies" : a.cos_sin ? "cos_sin" : "cos";
  const int64_t said = a.frequencies ? a.frequencies->rotary_dim
                       : a.cos_sin   ? sizes[Dim::kRotaryDim]
                                     : 2 * sizes[Dim::kPairs];
  *rotary_dim = a.rotary_dim ? a.rotary_dim : said;
  if (*rotary_dim % 2 != 0)
    return Invalid(a.rotary_dim ? "rotary_dim" : source, " must be even, but is ", *rotary_dim,
                   a.rotary_dim ? "" : " wide");
  if (*rotary_dim < 2) return Invalid(source, " must hold at least one pair, but holds none");
  if (*rotary_dim != said) {
    if (a.frequencies) return Invalid("rotary_dim is ", *rotary_dim, ", but frequencies are for ", said);
    const int64_t width = a.cos_sin ? *rotary_dim : *rotary_dim / 2;
    return Invalid(source, " must be ", width, " wide for rotary_dim ", *rotary_dim, ", but is ",
                   a.cos_sin ? said : said / 2, " wide");
  }
  if (*rotary_dim + a.rotary_offset > head_dim) {
    if (a.rotary_offset) {
      return Invalid("rotary_offset ", a.rotary_offset, " and rotary_dim ", *rotary_dim, " must fit in head_dim ",
                     head_dim);
    }
    const bool full = a.cos && !a.rotary_dim && *rotary_dim == 2 * head_dim;  // as transformers' tables are
    return Invalid(
        "rotary_dim must be at most head_dim ", head_dim, ", but is ", *rotary_dim,
        a.rotary_dim ? Text() : Text(" (from ", source, ")"),
        full ? ": cos and sin have one column for each pair; of tables with both halves give the first" : "");
  }
  if (a.axes && sizes[Dim::kPairs] != *rotary_dim / 2) {
    return Invalid("axes must have ", *rotary_dim / 2, " entries for rotary_dim ", *rotary_dim, ", but has ",
                   sizes[Dim::kPairs]);
  }
  return {};
}

Status CheckLimits(const Sizes& sizes) {
  constexpr int64_t kMaxHeads = 1 << 20;
  if (sizes[Dim::kQHeads] > kMaxHeads)
    return Invalid("q must have at most ", kMaxHeads, " heads, but has ", sizes[Dim::kQHeads]);
  if (sizes[Dim::kKHeads] > kMaxHeads)
    return Invalid("k must have at most ", kMaxHeads, " heads, but has ", sizes[Dim::kKHeads]);
  if (sizes[Dim::kVDim] > 65536) return Invalid("v must have a v_dim of at most 65536, but has ", sizes[Dim::kVDim]);
  return {};
}

// ---- lowering, a stage at a time: what the checks have found to params and variant ----------------------------------

// The arguments, and what the loop over the description has found of them.
struct Checked {
  explicit Checked(const ropewalk_rope_args& args)
      : a(args), mapped(args.axes || (args.frequencies && !args.frequencies->axes.empty())) {}
  const Strides& strides_of(size_t i) const {
    static constexpr Strides kAbsent = {};
    return TensorOf(kArgs[i], &a) ? strides[i] : kAbsent;
  }

  const ropewalk_rope_args& a;
  const bool mapped;  // pairs go by axes
  Sizes sizes;
  std::array<Strides, std::size(kArgs)> strides;  // of absent tensors undefined: read only what is there
};

rope_strides HeadStrides(const Strides& s, Dim heads) { return {s[Dim::kBatch], s[Dim::kTokens], s[heads]}; }

void LowerHeads(const Checked& c, int64_t rotary_dim, RopeCall* call) {
  const ropewalk_rope_args& a = c.a;
  rope_params& p = call->params;
  RopeVariant& v = call->variant;
  p.batch = a.q->ndim == 4 ? c.sizes[Dim::kBatch] : 1;
  p.tokens = c.sizes[Dim::kTokens];
  p.q_heads = static_cast<rw_i32>(c.sizes[Dim::kQHeads]);
  p.k_heads = a.k ? static_cast<rw_i32>(c.sizes[Dim::kKHeads]) : 0;
  p.head_dim = static_cast<rw_i32>(c.sizes[Dim::kHeadDim]);
  p.rotary_dim = static_cast<rw_i32>(rotary_dim);
  p.rotary_offset = a.rotary_offset;
  p.eps = static_cast<float>(a.eps);
  p.axes = 1;
  p.k_scale = p.v_scale = 1.0f;
  v.dtype = Constant(a.q);
  v.pairing = static_cast<uint8_t>(a.pairing);
  v.inverse = static_cast<uint8_t>(a.inverse);
  v.rounding = static_cast<uint8_t>(a.rounding);

  p.q = HeadStrides(c.strides_of(Index("q")), Dim::kQHeads);
  p.k = HeadStrides(c.strides_of(Index("k")), Dim::kKHeads);
  p.q_out = a.q_out ? HeadStrides(c.strides_of(Index("q_out")), Dim::kQHeads) : p.q;
  p.k_out = a.k_out ? HeadStrides(c.strides_of(Index("k_out")), Dim::kKHeads) : p.k;
}

// Their rows are axes if pairs are mapped.
Status LowerPositions(const Checked& c, RopeCall* call) {
  const ropewalk_rope_args& a = c.a;
  rope_params& p = call->params;
  RopeVariant& v = call->variant;
  const Strides& positions = c.strides_of(Index("positions"));
  p.positions_axis = positions[Dim::kAxes];
  p.positions_batch = positions[Dim::kBatch];
  p.positions_token = positions[Dim::kTokens];
  p.offsets_batch = c.strides_of(Index("offsets"))[Dim::kBatch];
  p.offsets_token = c.strides_of(Index("offsets"))[Dim::kTokens];
  v.positions_dtype = Constant(a.positions);
  v.offsets_dtype = Constant(a.offsets);
  const int64_t axes = c.sizes[Dim::kAxes];
  if (!c.mapped || axes < 0) return {};
  if (axes < 1) return Invalid("positions must have a row for each axis, but have none");
  if (axes > kMaxAxes) return Invalid("positions has ", axes, " axes, too many");
  p.axes = static_cast<rw_i32>(axes);
  v.axes = a.axes ? 2 : 1;
  if (a.axes) return {};
  const int64_t needed = int64_t{1} + *std::ranges::max_element(a.frequencies->axes);
  if (p.axes >= needed) return {};
  return Invalid("positions must have ", needed, " rows, one for each axis of frequencies, but has ", p.axes);
}

// Of frequencies, or of a table's rows.
Status LowerAngles(const Checked& c, RopeCall* call) {
  const ropewalk_rope_args& a = c.a;
  rope_params& p = call->params;
  if (a.frequencies) {
    p.attention_scaling = static_cast<float>(a.frequencies->attention_scaling);
    return {};
  }
  const Strides& cos = c.strides_of(a.cos_sin ? Index("cos_sin") : Index("cos"));
  const Strides& sin = c.strides_of(a.cos_sin ? Index("cos_sin") : Index("sin"));
  const Dim pair = a.cos_sin ? Dim::kRotaryDim : Dim::kPairs;
  p.rows = c.sizes[Dim::kRows];
  p.cos_batch = cos[Dim::kBatch];
  p.cos_row = cos[Dim::kRows];
  p.cos_pair = cos[pair];
  p.sin_batch = sin[Dim::kBatch];
  p.sin_row = sin[Dim::kRows];
  p.sin_pair = sin[pair];
  call->variant.table_dtype = Constant(a.cos_sin ? a.cos_sin : a.cos);
  p.attention_scaling = 1.0f;
  if (!a.positions && !a.offsets && p.batch > 0 && p.tokens > p.rows) {
    return Invalid("positions run from 0 to ", p.tokens - 1, " (none given), but ", a.cos_sin ? "cos_sin" : "cos",
                   " has ", p.rows, " rows");
  }
  return {};
}

// The scale of an fp8 cache: its value where the host has it, else how far apart those of heads are.
Status LowerScale(const Checked& c, const DLTensor* tensor, size_t i, float* value, rw_i32* stride) {
  if (!tensor) return {};
  const char* name = kArgs[i].name;
  const int64_t step = c.strides_of(i)[Dim::kKHeads];
  if (step > INT32_MAX || step < INT32_MIN)
    return Invalid(name, " must have a stride below 2^31, but its stride is ", step);
  if (const int64_t bad = HoldsHostScales(kArgs[i], *tensor) ? FirstBadScale(*tensor) : -1; bad >= 0) {
    const float found = ScaleAt(*tensor, bad);
    const std::string place = IsHostValue(kArgs[i], *tensor) ? "" : Text("[", bad, "]");
    if (found > 0.0f && found < kLeastScale)
      return Invalid(name, place, " must be at least ", kLeastScale, ", but is ", found);
    return Invalid(name, place, " must be a finite number > 0, but is ", found);
  }
  if (IsHostValue(kArgs[i], *tensor)) {
    *value = *static_cast<const float*>(DataOf(*tensor));
  } else {
    *stride = static_cast<rw_i32>(step);
  }
  return {};
}

Status LowerStore(const Checked& c, RopeCall* call) {
  const ropewalk_rope_args& a = c.a;
  rope_params& p = call->params;
  RopeVariant& v = call->variant;
  const Strides& slots = c.strides_of(Index("slots"));
  p.slots_batch = slots[Dim::kBatch];
  p.slots_token = slots[Dim::kTokens];
  v.slots_dtype = Constant(a.slots);
  const DLTensor* cache = a.k_cache ? a.k_cache : a.v_cache;
  v.cache_dtype = Constant(cache);
  p.page_size = c.sizes[Dim::kPageSize];
  p.slots = p.page_size * (cache->ndim == 4 ? cache->shape[0] : 1);
  if (a.k_cache && a.v_cache && a.k_cache->ndim != a.v_cache->ndim) {
    return Invalid("v_cache must have ", a.k_cache->ndim, " dimensions like k_cache, but has ", a.v_cache->ndim);
  }
  const auto cache_strides = [&](size_t i) {
    const Strides& s = c.strides_of(i);
    return rope_strides{s[Dim::kPages], s[Dim::kPageSize], s[Dim::kKHeads]};
  };
  p.k_cache = cache_strides(Index("k_cache"));
  p.v_cache = cache_strides(Index("v_cache"));
  p.v = HeadStrides(c.strides_of(Index("v")), Dim::kKHeads);
  p.v_dim = a.v ? static_cast<rw_i32>(c.sizes[Dim::kVDim]) : 0;
  p.k_heads = static_cast<rw_i32>(c.sizes[Dim::kKHeads]);
  v.store_k = a.k_store_only ? kRopeStoreOnly : a.k_cache ? kRopeStore : kRopeNoStore;
  v.store_v = a.v_cache != nullptr;
  ROPEWALK_TRY(LowerScale(c, a.k_scale, Index("k_scale"), &p.k_scale, &p.k_scale_head));
  return LowerScale(c, a.v_scale, Index("v_scale"), &p.v_scale, &p.v_scale_head);
}

}  // namespace

std::span<const Arg> RopeDescription() { return kArgs; }

bool HoldsHostScales(const Arg& arg, const DLTensor& tensor) {
  return (arg.flags & kHostScalar) && DeviceType(tensor.device) == kDLCPU;
}

bool IsHostValue(const Arg& arg, const DLTensor& tensor) {
  return HoldsHostScales(arg, tensor) && (tensor.ndim == 0 || tensor.shape[0] == 1);
}

int64_t FirstBadScale(const DLTensor& tensor) {
  const int64_t count = tensor.ndim == 0 ? 1 : tensor.shape[0];
  for (int64_t i = 0; i < count; ++i) {
    const float scale = ScaleAt(tensor, i);
    if (!(scale >= kLeastScale && scale <= kMostScale)) return i;
  }
  return -1;
}

void SetTensors(const ropewalk_rope_args& a, RopeCall* call) {
  const RopeVariant& v = call->variant;
  const rope_params& p = call->params;
  RopeTensors& t = call->tensors;
  const auto data = [](const DLTensor* tensor) { return tensor ? DataOf(*tensor) : nullptr; };
#define X(name, type) t.name = static_cast<type*>(data(a.name));  // NOLINT(bugprone-macro-parentheses): a type has none
  ROPE_TENSORS(X)
#undef X
  if (a.cos_sin) {
    t.cos = data(a.cos_sin);
    // By integers: nobody has asked yet whether the table lies where a pointer may point.
    const int64_t half = p.cos_pair * (p.rotary_dim / 2) * (a.cos_sin->dtype.bits / 8);
    if (t.cos) t.sin = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(t.cos) + static_cast<uintptr_t>(half));
  }
  if (v.axes != 2) t.axes = nullptr;
  if (!a.q_out) t.q_out = t.q;
  if (!a.k_out) t.k_out = t.k;
  if (v.store_k == kRopeStoreOnly) t.k_out = nullptr;
  if (a.k_scale && IsHostValue(kArgs[Index("k_scale")], *a.k_scale)) t.k_scale = nullptr;
  if (a.v_scale && IsHostValue(kArgs[Index("v_scale")], *a.v_scale)) t.v_scale = nullptr;
}

Status LowerRope(const ropewalk_rope_args& a, void* stream, RopeCall* call) {
  Checked c(a);
  ROPEWALK_TRY(Check(kArgs, &a, c.mapped, &c.sizes, c.strides));
  ROPEWALK_TRY(CheckCombination(a));
  int64_t rotary_dim = 0;
  ROPEWALK_TRY(FindRotaryDim(a, c.sizes, &rotary_dim));
  ROPEWALK_TRY(CheckLimits(c.sizes));

  call->frequencies = a.frequencies;
  call->device = a.q->device;
  call->stream = stream;
  call->sycl_queue = a.sycl_queue;
  call->disable_pdl = a.disable_pdl != 0;
  if (a.sycl_queue) {
    if (DeviceType(call->device) != kDlOneApi) {
      return Invalid("sycl_queue is given, but q is on ", DeviceName(call->device));
    }
    if (stream) return Invalid("sycl_queue and stream are both given: the work goes to one of them");
  }
  RopeVariant& v = call->variant;
  v = {};
  std::memset(&call->params, 0, sizeof(call->params));
  LowerHeads(c, rotary_dim, call);
  ROPEWALK_TRY(LowerPositions(c, call));
  ROPEWALK_TRY(LowerAngles(c, call));
  if (a.norm == ROPEWALK_NORM_RMS || a.q_weight) {
    v.norm = 1;
    if (a.q_weight) v.weight = a.zero_centered_weight ? kRopeZeroCenteredWeight : kRopeWeight;
    v.weight_dtype = Constant(a.q_weight);
  }
  if (a.slots) ROPEWALK_TRY(LowerStore(c, call));

  SetTensors(a, call);
  const RopeTensors& t = call->tensors;
  v.out_of_place = t.q_out != t.q || (t.k_out && t.k_out != t.k);
  constexpr Replaced kReplaced[] = {{"q", "q_out"}, {"k", "k_out"}};
  constexpr const char* kStoredOnly[] = {"k"};
  return CheckOverlap(kArgs, &a, kReplaced, std::span(kStoredOnly, a.k_store_only ? 1 : 0));
}

std::string ShapesText(const RopeCall& call) {
  const rope_params& p = call.params;
  const auto count = [](int64_t n, const char* one) { return Text(n, " ", one, n == 1 ? "" : "s"); };
  std::string text = p.batch > 1 ? Text("a batch of ", p.batch, ", ") : std::string();
  Append(&text, Text(count(p.tokens, "token"), ", ", count(p.q_heads, "head"), " of q"));
  if (p.k_heads > 0) Append(&text, Text(" and ", p.k_heads, " of k"));
  Append(&text, Text(", each of ", p.head_dim, ", of which ", p.rotary_dim, " are rotated"));
  return text;
}

}  // namespace ropewalk
