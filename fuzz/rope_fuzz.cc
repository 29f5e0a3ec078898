// Fuzzes ropewalk_rope and ropewalk_rope_backward: argument structs from bytes. Each tensor has exactly the memory that
// its shape and strides say, so that AddressSanitizer sees one byte too many. Refused calls must write nothing, served
// ones only what the reference says, with its numbers. Shapes that no memory could hold go to ropewalk_explain alone,
// which reads no data.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "conformance/reference.h"
#include "fuzz/bytes.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {
namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "rope_fuzz: %s\n", what.c_str());
  std::abort();
}

void Describe(const ropewalk_rope_args& args) {
  for (const Arg& arg : RopeDescription()) {
    const char* field = reinterpret_cast<const char*>(&args) + arg.offset;
    if (arg.kind == Kind::kDouble || arg.kind == Kind::kHandle || arg.kind == Kind::kQueue) continue;
    if (arg.kind != Kind::kTensor) {
      int32_t value;
      std::memcpy(&value, field, sizeof(value));
      if (value) std::fprintf(stderr, "  %s: %d\n", arg.name, value);
    } else if (const DLTensor* tensor = TensorOf(arg, &args)) {
      std::fprintf(stderr, "  %s: %s %s, strides", arg.name, DtypeName(tensor->dtype).c_str(),
                   ShapeText(*tensor).c_str());
      for (int i = 0; i < tensor->ndim; ++i)
        std::fprintf(stderr, " %lld", static_cast<long long>(StrideOf(*tensor, i)));
      std::fprintf(stderr, "\n");
    }
  }
}

constexpr double kMostBytes = 1 << 16;

struct Slab {
  std::unique_ptr<uint8_t[]> now;
  std::vector<uint8_t> before;
};

struct Tensor {
  const Arg* arg = nullptr;
  int64_t shape[8] = {}, strides[8] = {};
  DLTensor now = {}, before = {};
  Slab* slab = nullptr;
};

// The sizes that tensors share, so that many calls are accepted.
struct Shapes {
  int64_t sizes[static_cast<size_t>(Dim::kCount)];
  bool batched, mapped;
  DLDataType type, table_type, cache_type, weight_type;
};

struct Call {
  std::deque<Slab> slabs;
  std::deque<Tensor> tensors;
  ropewalk_rope_args args, before;
  ropewalk_rope_gradients gradients, gradients_before;
  Shapes shapes;
  bool wild = false;  // shapes beyond all memory: not to be run
  bool plain = true;  // finite numbers and good scales: comparable
};

DLDataType TypeFor(uint8_t choice) {
  constexpr DLDataType kTypes[] = {{kDLBfloat, 16, 1}, {kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {10, 8, 1},
                                   {12, 8, 1},         {kDLInt, 32, 1},   {kDLInt, 64, 1},   {kDLUInt, 8, 1}};
  return kTypes[choice % 8];
}

const ropewalk_frequencies* FrequenciesFor(uint8_t choice) {
  static ropewalk_frequencies* made[6] = {};
  if (!made[0]) {
    const double inv_freq[] = {1.0, 0.25, 0.01, 0.0};
    const int32_t axes[] = {0, 1, 2, 1};
    (void)ropewalk_frequencies_create(10000.0, 8, nullptr, 0, &made[0]);
    (void)ropewalk_frequencies_create(10000.0, 2, nullptr, 0, &made[1]);
    (void)ropewalk_frequencies_create(1e6, 16,
                                      "{\"rope_type\": \"yarn\", \"factor\": 4.0, "
                                      "\"original_max_position_embeddings\": 64}",
                                      0, &made[2]);
    (void)ropewalk_frequencies_from_array(inv_freq, 4, 1.0, axes, &made[3]);
    (void)ropewalk_frequencies_from_array(inv_freq, 1, 1.0, nullptr, &made[4]);
    (void)ropewalk_frequencies_create(10000.0, 6, nullptr, 0, &made[5]);
  }
  return made[choice % 6];
}

// Memory for a tensor, exactly as much as it spans; or none if that is too much.
void GiveMemory(Bytes& bytes, Call* call, Tensor* tensor) {
  DLTensor& t = tensor->now;
  const int64_t item = std::max<int64_t>(1, t.dtype.bits / 8);
  double low = 0, high = static_cast<double>(item), dense = 1;
  bool empty = false;
  for (int i = t.ndim; i-- > 0;) {
    const double stride = t.strides ? static_cast<double>(tensor->strides[i]) : dense;
    const auto count = static_cast<double>(tensor->shape[i]);
    dense *= count;
    empty |= count <= 0;
    (stride < 0 ? low : high) += (count - 1) * stride * static_cast<double>(item);
  }
  if (high - low > kMostBytes && !empty) {
    alignas(64) static uint8_t somewhere[64];
    t.data = somewhere;
    call->wild = true;
    return;
  }
  const int64_t first = empty ? 0 : static_cast<int64_t>(-low);  // of the span, where strides are negative
  const auto size = static_cast<size_t>(empty ? item : first + static_cast<int64_t>(high));
  // Sometimes in the memory of another tensor.
  Slab* slab = nullptr;
  if (!call->slabs.empty() && bytes.OneIn(16)) {
    Slab& other = call->slabs[bytes.Next() % call->slabs.size()];
    if (other.before.size() >= size) slab = &other;
  }
  if (!slab) {
    slab = &call->slabs.emplace_back();
    slab->before.resize(size);
    const uint8_t seed = bytes.Next();
    const uint32_t dtype = t.dtype.lanes == 1 ? DtypeOf(t.dtype) : 0;
    const bool raw = seed % 16 == 15;
    const bool scale = tensor->arg && std::strstr(tensor->arg->name, "_scale");
    if (raw) call->plain = false;
    for (size_t i = 0; i + static_cast<size_t>(item) <= size; i += static_cast<size_t>(item)) {
      uint8_t* at = slab->before.data() + i;
      const auto n = static_cast<int64_t>((i * 2654435761u >> 4) + seed);
      if (raw || dtype == 0) {
        for (int64_t b = 0; b < item; ++b) at[b] = bytes.Next();
      } else if (dtype & kInts) {
        const bool wide = seed % 8 == 7;  // positions so far out that the 64 bits of a frequency tell
        if (wide) call->plain = false;
        const int64_t value = wide ? bytes.Wide() : n % 7 - (seed % 4 == 3 ? 2 : 0);
        std::memcpy(at, &value, static_cast<size_t>(item));
      } else {
        StoreNumber(dtype, scale ? 0.5 + static_cast<double>(n % 5) : static_cast<double>(n % 37 - 18) / 8, at);
      }
    }
    slab->now.reset(new uint8_t[size]);
    std::memcpy(slab->now.get(), slab->before.data(), size);
  } else {
    call->plain = false;
  }
  tensor->slab = slab;
  t.data = slab->now.get() + first;
  if (bytes.OneIn(8)) {  // a part through byte_offset
    t.byte_offset = static_cast<uint64_t>(item);
    t.data = static_cast<uint8_t*>(t.data) - item;
  }
  tensor->before = t;
  tensor->before.data = slab->before.data() + (static_cast<uint8_t*>(t.data) - slab->now.get());
}

DLTensor* MakeTensor(Bytes& bytes, Call* call, const Arg& arg, const Shapes& shapes) {
  Tensor& tensor = call->tensors.emplace_back();
  tensor.arg = &arg;
  DLTensor& t = tensor.now;
  t.device = {kDLCPU, 0};
  t.dtype = arg.dtypes & kInts   ? TypeFor(static_cast<uint8_t>(arg.dtypes == kI32 ? 5 : 5 + bytes.Next() % 2))
            : arg.dtypes == kF32 ? DLDataType{kDLFloat, 32, 1}
            : std::strstr(arg.name, "weight")          ? shapes.weight_type
            : std::strstr(arg.name, "cache")           ? shapes.cache_type
            : arg.name[0] == 'c' || arg.name[0] == 's' ? shapes.table_type
                                                       : shapes.type;
  for (const Dim dim : arg.dims) {
    if (dim == Dim::kNone) continue;
    if (dim == Dim::kBatch && !shapes.batched) continue;
    if (dim == Dim::kAxes && !shapes.mapped) continue;
    tensor.shape[t.ndim++] = shapes.sizes[static_cast<size_t>(dim)];
  }
  const auto drop_first = [&] {
    for (int i = 1; i < t.ndim; ++i) tensor.shape[i - 1] = tensor.shape[i];
    --t.ndim;
  };
  if ((arg.flags & (kOptionalPages | kBroadcast)) && t.ndim > 0 && bytes.OneIn(3)) drop_first();
  if ((arg.flags & kBroadcast) && t.ndim > 0 && bytes.OneIn(4)) tensor.shape[0] = 1;
  t.shape = tensor.shape;
  t.strides = bytes.OneIn(3) ? nullptr : tensor.strides;
  int64_t stride = 1;
  for (int i = t.ndim; i-- > 0;) {
    tensor.strides[i] = stride;
    stride *= std::max<int64_t>(tensor.shape[i], 1);
    if (bytes.OneIn(6)) stride += bytes.Next() % 8;  // a gap
  }
  if (t.ndim > 1 && bytes.OneIn(8)) std::swap(tensor.strides[0], tensor.strides[t.ndim - 2]);

  // What is wrong, now and then.
  const uint8_t spoil = bytes.Next();
  const int i = t.ndim > 0 ? bytes.Next() % t.ndim : 0;
  switch (spoil) {
    case 240: t.dtype = TypeFor(bytes.Next()); break;
    case 241: t.dtype = {bytes.Next(), bytes.Next(), bytes.Next()}; break;
    case 242: t.device = {static_cast<DLDeviceType>(bytes.Next() % 16), bytes.Next() % 3}; break;
    case 243: tensor.shape[i] = bytes.Small(); break;
    case 244: tensor.shape[i] = bytes.Wide(); break;
    case 245: tensor.strides[i] = bytes.Small(); break;
    case 246: tensor.strides[i] = bytes.Wide(); break;
    case 247: tensor.strides[i] = -tensor.strides[i]; break;
    case 248: t.ndim = bytes.Next() % 8; break;
    case 249: t.ndim = static_cast<int32_t>(bytes.Wide()) % 8; break;
    case 250: tensor.strides[i] = 0; break;
    case 251: tensor.shape[i] += 1; break;
    default: break;
  }
  GiveMemory(bytes, call, &tensor);
  switch (spoil) {
    case 252: t.shape = nullptr; break;
    case 253:
      t.data = nullptr;
      call->wild |= t.byte_offset != 0;
      break;
    case 254:
      t.byte_offset += 1;
      call->wild = true;
      break;
    case 255:
      if (arg.flags & kHostScalar) break;  // read when the call is checked
      t.byte_offset = static_cast<uint64_t>(bytes.Wide());
      call->wild = true;
      break;
    default: break;
  }
  tensor.before.shape = t.shape;
  return &t;
}

template <class T>
void SetField(ropewalk_rope_args* args, size_t offset, T value) {
  std::memcpy(reinterpret_cast<char*>(args) + offset, &value, sizeof(value));
}

// `before`: the same call over the numbers before it.
void MakeBefore(Call* call) {
  call->before = call->args;
  call->gradients_before = call->gradients;
  for (const Tensor& tensor : call->tensors) {
    const auto replace = [&](auto* of) {
      for (size_t at = 0; at + sizeof(void*) <= sizeof(*of); at += sizeof(void*)) {
        char* const field = reinterpret_cast<char*>(of) + at;
        const DLTensor *now = &tensor.now, *before = &tensor.before;
        if (std::memcmp(field, &now, sizeof(now)) == 0) std::memcpy(field, &before, sizeof(before));
      }
    };
    replace(&call->before);
    replace(&call->gradients_before);
  }
}

// Has the call ask for its gradient: its outputs go, and dY comes.
void MakeGradients(Bytes& bytes, Call* call) {
  Shapes& shapes = call->shapes;
  ropewalk_rope_args& args = call->args;
  const auto drop = [&](auto*&... fields) { ((bytes.OneIn(64) ? fields : fields = nullptr), ...); };
  drop(args.q_out, args.k_out, args.v, args.k_cache, args.v_cache, args.slots, args.k_scale, args.v_scale);
  if (!bytes.OneIn(64)) args.k_store_only = 0;
  const bool k = args.k != nullptr, weights = bytes.Next() % 2, out = bytes.OneIn(2);
  if (bytes.OneIn(4)) args.q = args.k = nullptr;
  for (const Arg& arg : RopeBackwardDescription().first(kRopeGradients)) {
    const std::string name = arg.name;
    if (name == "workspace") {
      const int64_t needed = ropewalk_rope_backward_workspace(&args, &call->gradients);
      if (static_cast<double>(needed) > kMostBytes / 4) call->wild = true;
      shapes.sizes[static_cast<size_t>(Dim::kWorkspace)] = std::max<int64_t>(needed, 0) + (bytes.OneIn(16) ? -1 : 0);
      if (needed <= 0 && !bytes.OneIn(8)) continue;
    }
    const bool of_k = name[0] == 'k';
    bool wanted = name == "workspace" || ((!of_k || k) && (name == "q_grad" || name == "k_grad"));
    wanted |= (!of_k || k) && (name == "q_grad_out" || name == "k_grad_out") && out;
    wanted |= (of_k ? args.k_weight : args.q_weight) && name.ends_with("weight_grad") && weights;
    if (bytes.OneIn(64)) wanted = !wanted;
    if (!wanted) continue;
    DLTensor* const tensor = MakeTensor(bytes, call, arg, shapes);
    std::memcpy(reinterpret_cast<char*>(&call->gradients) + arg.offset - offsetof(RopeBackwardArgs, gradients), &tensor,
                sizeof(tensor));
  }
}

void MakeCall(Bytes& bytes, Call* call) {
  Shapes& shapes = call->shapes;
  const auto size = [&](Dim dim) -> int64_t& { return shapes.sizes[static_cast<size_t>(dim)]; };
  constexpr int64_t kHeadDims[] = {8, 16, 2, 6, 32, 40, 64, 10};
  size(Dim::kBatch) = bytes.Next() % 4;
  size(Dim::kTokens) = bytes.Next() % 8;
  size(Dim::kQHeads) = 1 + bytes.Next() % 4;
  size(Dim::kKHeads) = bytes.Next() % 4;
  size(Dim::kHeadDim) = kHeadDims[bytes.Next() % 8];
  size(Dim::kVDim) = kHeadDims[bytes.Next() % 8];
  size(Dim::kRows) = bytes.Next() % 12;
  size(Dim::kPairs) = bytes.OneIn(4) ? 1 + bytes.Next() % 8 : std::min<int64_t>(4, size(Dim::kHeadDim) / 2);
  size(Dim::kRotaryDim) = 2 * size(Dim::kPairs);
  size(Dim::kAxes) = 1 + bytes.Next() % 4;
  size(Dim::kPages) = bytes.Next() % 5;
  size(Dim::kPageSize) = bytes.Next() % 5;
  shapes.batched = bytes.OneIn(3);
  shapes.type = TypeFor(bytes.Next() % 3);
  shapes.table_type = TypeFor(bytes.Next() % 3);
  shapes.weight_type = TypeFor(bytes.Next() % 3);
  shapes.cache_type = bytes.OneIn(2) ? TypeFor(3 + bytes.Next() % 2) : shapes.type;

  ropewalk_rope_args& args = call->args;
  const uint8_t mask_low = bytes.Next(), mask_high = bytes.Next(), way = bytes.Next();
  const bool norm = mask_low & 1, weight = mask_low & 2, out = mask_low & 4, store = mask_low & 8, k = !(mask_low & 16);
  const bool axes = mask_low & 32, positions = !(mask_low & 64), offsets = mask_low & 128;
  if (way % 4 < 2) args.frequencies = FrequenciesFor(way / 4 % 8 < 3 ? 0 : way / 32);
  shapes.mapped = axes || (args.frequencies && ropewalk_frequencies_axes(args.frequencies));
  for (const Arg& arg : RopeDescription()) {
    if (arg.kind == Kind::kTensor) {
      const std::string name = arg.name;
      bool wanted = name == "q" || (name == "k" && k) || (name == "positions" && positions) ||
                    (name == "offsets" && offsets) || (name == "cos" && way % 4 == 2) ||
                    (name == "sin" && way % 4 == 2) || (name == "cos_sin" && way % 4 == 3) ||
                    (name == "axes" && axes) || (name == "q_weight" && weight) || (name == "k_weight" && weight && k) ||
                    (name == "q_out" && out) || (name == "k_out" && out && k && !(mask_high & 1)) ||
                    (name == "v" && store && mask_high & 2) || (name == "k_cache" && store && k) ||
                    (name == "v_cache" && store && mask_high & 2) || (name == "slots" && store);
      const bool fp8 = shapes.cache_type.bits == 8;
      wanted |= name == "k_scale" && store && k && fp8 && mask_high & 4;
      wanted |= name == "v_scale" && store && fp8 && mask_high & 2 && mask_high & 4;
      if (bytes.OneIn(64)) wanted = !wanted;
      if (wanted) SetField(&args, arg.offset, MakeTensor(bytes, call, arg, shapes));
      continue;
    }
    if (arg.kind == Kind::kBool || arg.kind == Kind::kChoice) {
      const bool on = arg.offset == offsetof(ropewalk_rope_args, norm) ? norm : bytes.OneIn(3);
      const bool centered = arg.offset == offsetof(ropewalk_rope_args, zero_centered_weight);
      SetField<int32_t>(&args, arg.offset, on && (!centered || weight));
    }
    if (bytes.OneIn(64)) {
      if (arg.kind == Kind::kDouble) args.eps = bytes.OneIn(2) ? NAN : static_cast<int8_t>(bytes.Next());
      if (arg.kind != Kind::kDouble && arg.kind != Kind::kHandle && arg.kind != Kind::kQueue) {
        SetField<int32_t>(&args, arg.offset, bytes.OneIn(2) ? static_cast<int32_t>(bytes.Wide()) : bytes.Next() % 16);
      }
    }
  }
  if (bytes.OneIn(64)) {
    args.struct_size = bytes.OneIn(2) ? bytes.Next() : static_cast<uint32_t>(bytes.Wide());
    if (args.struct_size < sizeof(args)) args.struct_size &= ~7u;  // between fields: half a pointer is no pointer
  }
}

// Memory as it must be now; where the call may write, as it is. visit(see) has see(row, the tensor with the numbers
// before, its name) called for each row of an output; own(see) has see(tensor, an element, whether it is right) called
// for other numbers that may be written.
template <class Visit, class Own>
void CheckServed(Call& call, const Visit& visit, const Own& own) {
  std::vector<std::vector<uint8_t>> expected;
  std::vector<std::vector<bool>> written;
  for (const Slab& slab : call.slabs) {
    expected.push_back(slab.before);
    written.emplace_back(slab.before.size());
  }
  bool twice = false;  // two tokens in one slot, or strides by which rows meet: either may stay
  std::string wrong;
  const auto tensor_of = [&](const DLTensor* before, size_t* s) -> const Tensor& {
    const auto tensor =
        std::find_if(call.tensors.begin(), call.tensors.end(), [&](const Tensor& t) { return &t.before == before; });
    for (*s = 0; &call.slabs[*s] != tensor->slab;) ++*s;
    return *tensor;
  };
  const auto take = [&](size_t s, ptrdiff_t at, int64_t item) {
    twice |= written[s][static_cast<size_t>(at)];
    written[s][static_cast<size_t>(at)] = true;
    std::memcpy(expected[s].data() + at, call.slabs[s].now.get() + at, static_cast<size_t>(item));
  };
  visit([&](const ExpectedRow& row, const DLTensor* before, const char* name) {
    size_t s = 0;
    const Tensor& tensor = tensor_of(before, &s);
    const int64_t item = before->dtype.bits / 8;
    const ptrdiff_t first = static_cast<const uint8_t*>(before->data) + before->byte_offset -
                            tensor.slab->before.data() + RowOffset(*before, row.outer, row.token, row.head) * item;
    for (size_t i = 0; i < row.elements.size(); ++i) {
      const Expected& want = row.elements[i];
      if (want.want == Expected::Want::kSame) continue;
      const ptrdiff_t at = first + static_cast<ptrdiff_t>(i) * item;
      const uint8_t* got_bytes = tensor.slab->now.get() + at;
      take(s, at, item);
      const double got = LoadNumber(DtypeOf(before->dtype), got_bytes);
      const bool right = want.want == Expected::Want::kNan ? std::isnan(got)
                         : want.want == Expected::Want::kBits
                             ? std::memcmp(got_bytes, &want.bits, static_cast<size_t>(item)) == 0
                             : got >= want.low && got <= want.high;
      if (!right && wrong.empty()) {
        wrong = std::string(name) + "[" + std::to_string(row.outer) + ", " + std::to_string(row.token) + ", " +
                std::to_string(row.head) + ", " + std::to_string(i) + "]: got " + std::to_string(got) + ", want " +
                std::to_string(want.value) + " (" + std::to_string(want.low) + " to " + std::to_string(want.high) + ")";
      }
    }
  });
  own([&](const DLTensor* before, int64_t count, const char* name, const auto& right) {
    size_t s = 0;
    const Tensor& tensor = tensor_of(before, &s);
    const ptrdiff_t first =
        static_cast<const uint8_t*>(before->data) + before->byte_offset - tensor.slab->before.data();
    for (int64_t i = 0; i < count; ++i) {
      const ptrdiff_t at = first + i * 4;
      take(s, at, 4);
      float got;
      std::memcpy(&got, tensor.slab->now.get() + at, sizeof(got));
      if (!right(i, static_cast<double>(got)) && wrong.empty())
        wrong = std::string(name) + "[" + std::to_string(i) + "]: got " + std::to_string(got);
    }
  });
  if (call.plain && !twice && !wrong.empty()) {
    Describe(call.args);
    Fail(wrong);
  }
  for (size_t s = 0; s < call.slabs.size(); ++s) {
    const std::vector<uint8_t>& want = expected[s];
    if (std::memcmp(want.data(), call.slabs[s].now.get(), want.size()) == 0) continue;
    Describe(call.args);
    Fail("a served call wrote beside its outputs");
  }
}

void CheckCall(Call& call) {
  CheckServed(
      call,
      [&](const auto& see) {
        RopeReference(call.before, [&](const ExpectedRow& row) {
          see(row, OutputTensor(call.before, row.output), OutputName(call.before, row.output));
        });
      },
      [](const auto&) {});
}

void CheckGradients(Call& call) {
  const ropewalk_rope_gradients& g = call.gradients_before;
  ReferenceWeightGrad q_weight, k_weight;
  CheckServed(
      call,
      [&](const auto& see) {
        RopeBackwardReference(
            call.before, g,
            [&](const ExpectedRow& row) {
              const bool of_k = row.output == RopeOutput::kK;
              DLTensor* const out = of_k ? g.k_grad_out : g.q_grad_out;
              see(row, out ? out : of_k ? g.k_grad : g.q_grad, of_k ? "dK" : "dQ");
            },
            &q_weight, &k_weight);
      },
      [&](const auto& see) {
        const auto sums = [&](const DLTensor* tensor, const ReferenceWeightGrad& want, const char* name) {
          if (!tensor) return;
          see(tensor, tensor->shape[0], name, [&](int64_t i, double got) {
            const auto at = static_cast<size_t>(i);
            return std::abs(got - want.value[at]) <=
                   std::ldexp(want.magnitude[at], -20) + std::ldexp(std::abs(got), -24);
          });
        };
        sums(g.q_weight_grad, q_weight, "q_weight_grad");
        sums(g.k_weight_grad, k_weight, "k_weight_grad");
        if (g.workspace) see(g.workspace, g.workspace->shape[0], "workspace", [](int64_t, double) { return true; });
      });
}

}  // namespace
}  // namespace ropewalk

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace ropewalk;
  Bytes bytes(data, size);
  Call call;
  MakeCall(bytes, &call);
  const bool gradients = bytes.OneIn(2);
  if (gradients) MakeGradients(bytes, &call);
  MakeBefore(&call);
  bool served = false;
  int code = ROPEWALK_OK;
  if (gradients) {
    if (call.wild) return 0;
    code = ropewalk_rope_backward(&call.args, &call.gradients, nullptr);
    served = code == ROPEWALK_OK;
  } else {
    served = ropewalk_explain(&call.args) != nullptr;
    if (call.wild) return 0;
    code = ropewalk_rope(&call.args, nullptr);
    if ((code == ROPEWALK_OK) != served) Fail("ropewalk_rope and ropewalk_explain do not agree");
  }
  if (!served && std::strncmp(ropewalk_last_error(), "rope: ", 6) != 0) {
    Fail(std::string("a message without the operation's name: ") + ropewalk_last_error());
  }
  if (code == ROPEWALK_INTERNAL) Fail(ropewalk_last_error());
  if (code == ROPEWALK_OK) {
    if (call.args.struct_size == sizeof(call.args)) gradients ? CheckGradients(call) : CheckCall(call);
    const int faults = ropewalk_check_faults();
    if (faults != ROPEWALK_OK && faults != ROPEWALK_FAULT) Fail("ropewalk_check_faults failed");
  } else {
    for (const Slab& slab : call.slabs) {
      if (std::memcmp(slab.before.data(), slab.now.get(), slab.before.size()) != 0) Fail("a refused call wrote");
    }
  }
  return 0;
}
