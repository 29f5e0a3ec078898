// What a case becomes in memory: buffers with canaries around and between the elements, filled, and the tensors of the
// call.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/reference.h"
#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {

// The same numbers for the same name on every machine.
class NamedRandom {
 public:
  explicit NamedRandom(std::string_view name) {
    for (const char c : name) state_ = (state_ ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  }
  uint64_t Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next() % static_cast<uint64_t>(n)); }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }  // [0, 1)
  // The sum of four: nearly normal, variance 4/3 * 0.75 = 1.
  double Normal() {
    const uint64_t bits = Next();
    double sum = -2.0;
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(bits >> 16 * i & 0xFFFF) * 0x1p-16;
    return sum * 1.7320508075688772;
  }

 private:
  uint64_t state_ = 0xCBF29CE484222325u;
};

namespace {

// A NaN in float16 and fp8, a huge number in float32 and bfloat16: what reads it shows.
constexpr uint8_t kCanary = 0xFE;
constexpr int64_t kListedPositions[] = {0, 1, 2047, 32767, 131071, (1 << 20) - 1, (1 << 24) + 1, 2147483647};

DLDataType TypeFor(uint32_t dtype) {
  switch (dtype) {
    case kF32: return {kDLFloat, 32, 1};
    case kF16: return {kDLFloat, 16, 1};
    case kBF16: return {kDLBfloat, 16, 1};
    case kE4M3: return {10, 8, 1};
    case kE5M2: return {12, 8, 1};
    case kI32: return {kDLInt, 32, 1};
    default: return {kDLInt, 64, 1};
  }
}

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

std::vector<int64_t> Contiguous(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  return strides;
}

}  // namespace

struct CaseCall::Builder {
  CaseCall& call;
  const RopeCase& c;
  NamedRandom random;

  // ---- memory

  Buffer* NewBuffer(std::string name, int64_t bytes) {
    auto buffer = std::make_unique<Buffer>();
    buffer->name = std::move(name);
    buffer->initial.assign(static_cast<size_t>(bytes + 2 * kGuardBytes), kCanary);
    call.buffers_.push_back(std::move(buffer));
    return call.buffers_.back().get();
  }

  // A view from element `first` on; `offset_elements` of it are told through byte_offset.
  Tensor* NewTensor(std::string name, Buffer* buffer, uint32_t dtype, const std::vector<int64_t>& shape,
                    const std::vector<int64_t>& strides, int64_t first, int64_t offset_elements = 0) {
    auto tensor = std::make_unique<Tensor>();
    tensor->name = std::move(name);
    tensor->buffer = buffer;
    const DLDataType type = TypeFor(dtype);
    const int64_t item = type.bits / 8;
    tensor->first = kGuardBytes + first * item;
    std::copy(shape.begin(), shape.end(), tensor->shape);
    std::copy(strides.begin(), strides.end(), tensor->strides);
    DLTensor& host = tensor->on_host;
    host.data = buffer->initial.data() + tensor->first - offset_elements * item;
    host.byte_offset = static_cast<uint64_t>(offset_elements * item);
    host.device = {kDLCPU, 0};
    host.ndim = static_cast<int32_t>(shape.size());
    host.dtype = type;
    host.shape = tensor->shape;
    host.strides = tensor->strides;
    call.tensors_.push_back(std::move(tensor));
    return call.tensors_.back().get();
  }

  Tensor* NewContiguous(const std::string& name, uint32_t dtype, const std::vector<int64_t>& shape) {
    Buffer* buffer = NewBuffer(name, Product(shape) * TypeFor(dtype).bits / 8);
    return NewTensor(name, buffer, dtype, shape, Contiguous(shape), 0);
  }

  // Calls body(address, index in the tensor's order).
  template <class Body>
  static void EachElement(Tensor* tensor, Body body) {
    const DLTensor& t = tensor->on_host;
    int64_t index[4] = {}, count = 1;
    for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
    uint8_t* base = static_cast<uint8_t*>(t.data) + t.byte_offset;
    for (int64_t n = 0; n < count; ++n) {
      int64_t offset = 0;
      for (int i = 0; i < t.ndim; ++i) offset += index[i] * t.strides[i];
      body(base + offset * (t.dtype.bits / 8), n);
      for (int i = t.ndim; i-- > 0;) {
        if (++index[i] < t.shape[i]) break;
        index[i] = 0;
      }
    }
  }

  static void StoreInteger(uint32_t dtype, int64_t value, uint8_t* at) {
    const auto narrow = static_cast<int32_t>(value);
    dtype == kI32 ? std::memcpy(at, &narrow, 4) : std::memcpy(at, &value, 8);
  }

  void FillIntegers(Tensor* tensor, const std::vector<int64_t>& values) {
    const uint32_t dtype = DtypeOf(tensor->on_host.dtype);
    EachElement(tensor, [&](uint8_t* at, int64_t n) { StoreInteger(dtype, values[static_cast<size_t>(n)], at); });
  }

  // Of any sign and payload, quiet and signalling.
  void StoreNan(uint32_t dtype, uint8_t* at) {
    const uint32_t infinity = dtype == kF32 ? 0x7F800000u : dtype == kF16 ? 0x7C00u : 0x7F80u;
    const uint32_t mantissa = dtype == kF32 ? 0x7FFFFFu : dtype == kF16 ? 0x3FFu : 0x7Fu;
    const uint32_t sign = dtype == kF32 ? 0x80000000u : 0x8000u;
    const auto draw = static_cast<uint32_t>(random.Next());
    const uint32_t payload = draw % 4 == 0 ? 1u : draw % 4 == 1 ? mantissa : std::max(draw & mantissa, 1u);
    const uint32_t bits = infinity | payload | (draw >> 31 ? sign : 0u);
    std::memcpy(at, &bits, static_cast<size_t>(DtypeBytes(dtype)));
  }

  void FillData(Tensor* tensor) {
    const uint32_t dtype = DtypeOf(tensor->on_host.dtype);
    const double large = dtype == kF16 ? 30000.0 : 1e15, tiny = dtype == kF16    ? 0x1p-20
                                                                : dtype == kBF16 ? 1e-39
                                                                                 : 1e-41;
    const double mixed[] = {0.0, tiny, 1e-3, 1.0, 100.0};
    const double scale = c.data == Data::kLarge ? large : c.data == Data::kTiny ? tiny : 1.0;
    EachElement(tensor, [&](uint8_t* at, int64_t) {
      double value = random.Normal() * (c.data == Data::kMixed ? mixed[random.Below(std::size(mixed))] : scale);
      if (c.data == Data::kNonFinite && random.Below(40) == 0) {
        const int64_t kind = random.Below(3);
        if (kind == 0) return StoreNan(dtype, at);
        value = std::copysign(std::numeric_limits<double>::infinity(), kind == 1 ? 1.0 : -1.0);
      }
      StoreNumber(dtype, value, at);
    });
  }

  // ---- q, k, v and the outputs

  struct Heads {
    std::string name;
    int64_t heads, dim;
  };

  // Tensors [batch?, tokens, heads, dim] in the case's layout.
  std::vector<Tensor*> NewHeads(const std::vector<Heads>& wanted) {
    const int64_t batch = std::max<int64_t>(c.batch, 1), tokens = c.tokens;
    const int64_t item = TypeFor(c.dtype).bits / 8;
    std::vector<Tensor*> tensors;
    int64_t row = c.row_gap;
    std::string names;
    for (const Heads& h : wanted) {
      row += h.heads * h.dim;
      Append(&names, Text(names.empty() ? "" : "+", h.name));
    }
    Buffer* packed = c.layout == Layout::kPacked ? NewBuffer(names, batch * tokens * row * item) : nullptr;
    int64_t column = 0;
    for (const Heads& h : wanted) {
      int64_t head = h.dim, token = h.heads * h.dim, outer = tokens * token, first = 0, offset = 0;
      switch (c.layout) {
        case Layout::kSeparate: break;
        case Layout::kPacked:
          token = row;
          outer = tokens * row;
          first = column;
          column += h.heads * h.dim;
          break;
        case Layout::kTransposed:
          head = tokens * h.dim;
          token = h.dim;
          break;
        case Layout::kPadded:
          head = h.dim + 5;
          token = h.heads * head + 7;
          outer = tokens * token + 11;
          break;
        case Layout::kMisaligned: first = offset = 1; break;
        case Layout::kReversed:
          first = tokens > 0 ? (tokens - 1) * token : 0;
          token = -token;
          break;
      }
      std::vector<int64_t> shape = {tokens, h.heads, h.dim}, strides = {token, head, 1};
      if (c.batch) {
        shape.insert(shape.begin(), c.batch);
        strides.insert(strides.begin(), outer);
      }
      Buffer* buffer = packed ? packed : NewBuffer(h.name, (batch * std::abs(outer) + offset) * item);
      tensors.push_back(NewTensor(h.name, buffer, c.dtype, shape, strides, first, offset));
    }
    return tensors;
  }

  void MakeHeads() {
    std::vector<Heads> wanted = {{"q", c.q_heads, c.head_dim}};
    if (c.k_heads) wanted.push_back({"k", c.k_heads, c.head_dim});
    const bool stored = c.cache != Cache::kNone && c.store_v, v = stored || c.v_behind;
    if (v) wanted.push_back({"v", c.k_heads, c.v_dim});
    const std::vector<Tensor*> inputs = NewHeads(wanted);
    for (Tensor* tensor : inputs) FillData(tensor);
    call.host_args_.q = &inputs[0]->on_host;
    if (c.k_heads) call.host_args_.k = &inputs[1]->on_host;
    if (stored) call.host_args_.v = &inputs.back()->on_host;
    if (call.backward_) return MakeGradients(wanted);
    if (!c.out_of_place) return;
    for (Heads& h : wanted) h.name += "_out";
    if (v) wanted.pop_back();
    if (c.k_store_only) wanted.pop_back();
    const std::vector<Tensor*> outputs = NewHeads(wanted);
    call.host_args_.q_out = &outputs[0]->on_host;
    if (c.k_heads && !c.k_store_only) call.host_args_.k_out = &outputs[1]->on_host;
  }

  void MakeGradients(std::vector<Heads> wanted) {
    ropewalk_rope_gradients& g = call.host_gradients_;
    for (Heads& h : wanted) h.name += "_grad";
    const std::vector<Tensor*> grads = NewHeads(wanted);
    for (Tensor* tensor : grads) FillData(tensor);
    g.q_grad = &grads[0]->on_host;
    if (c.k_heads) g.k_grad = &grads[1]->on_host;
    // Without a norm q and k are not needed.
    if (!c.norm && c.weight == Weight::kNone && random.Below(2)) call.host_args_.q = call.host_args_.k = nullptr;
    if (!c.out_of_place) return;
    for (Heads& h : wanted) h.name += "_out";
    const std::vector<Tensor*> outputs = NewHeads(wanted);
    g.q_grad_out = &outputs[0]->on_host;
    if (c.k_heads) g.k_grad_out = &outputs[1]->on_host;
  }

  // Now and then one is frozen.
  void MakeWeightGradients() {
    if (c.weight == Weight::kNone) return;
    const auto make = [&](const char* name) -> DLTensor* {
      return random.Below(4) == 0 ? nullptr : &NewContiguous(name, kF32, {c.head_dim})->on_host;
    };
    call.host_gradients_.q_weight_grad = make("q_weight_grad");
    if (c.k_heads) call.host_gradients_.k_weight_grad = make("k_weight_grad");
  }

  void MakeWeights() {
    if (c.weight == Weight::kNone) return;
    const auto make = [&](const char* name) {
      Tensor* tensor = NewContiguous(name, c.weight_dtype, {c.head_dim});
      const double middle = c.weight == Weight::kPlain ? 1.0 : 0.0;
      EachElement(tensor,
                  [&](uint8_t* at, int64_t) { StoreNumber(c.weight_dtype, middle + random.Uniform() - 0.5, at); });
      return &tensor->on_host;
    };
    call.host_args_.q_weight = make("q_weight");
    if (c.k_heads) call.host_args_.k_weight = make("k_weight");
  }

  // ---- angles and positions

  int64_t pairs() const { return c.rotary_dim / 2; }
  int64_t rows() const { return c.tokens + 64; }
  bool table() const { return c.angles != Angles::kFrequencies; }

  double InvFreq(int64_t pair) const {
    return std::pow(c.theta, -2.0 * static_cast<double>(pair) / static_cast<double>(c.rotary_dim));
  }

  std::vector<int32_t> AxisOfPairs() const {
    std::vector<int32_t> axes(static_cast<size_t>(pairs()));
    for (int64_t pair = 0; pair < pairs(); ++pair) {
      int32_t axis = 0;
      const int64_t first = pairs() / 4, second = (pairs() - first) / 2;  // 16, 24, 24 of 64
      switch (c.axes) {
        case Axes::kNone: break;
        case Axes::kSections: axis = pair < first ? 0 : pair < first + second ? 1 : 2; break;
        case Axes::kInterleaved: axis = pair < pairs() * 15 / 16 ? static_cast<int32_t>(pair % 3) : 0; break;
        case Axes::kTwo: axis = pair < pairs() / 2 ? 0 : 1; break;
      }
      axes[static_cast<size_t>(pair)] = axis;
    }
    return axes;
  }

  Status MakeAngles() {
    ropewalk_rope_args& a = call.host_args_;
    const std::vector<int32_t> axes = AxisOfPairs();
    if (c.axes_dtype) {
      Tensor* tensor = NewContiguous("axes", kI32, {pairs()});
      std::vector<int64_t> values(axes.begin(), axes.end());
      if (c.bad == Bad::kAxis) values[values.size() / 2] = random.Below(2) ? 1000000 : -1;
      FillIntegers(tensor, values);
      a.axes = &tensor->on_host;
    }
    if (!table()) return MakeFrequencies(axes);

    const int64_t batch = c.angles == Angles::kPerBatch ? c.batch : 1;
    const double length = random.Below(2) ? 1.25 : 1.0;  // an attention scaling, in the table
    const auto number = [&](int64_t b, int64_t row, int64_t pair, bool sine) {
      const double angle = static_cast<double>(row) * InvFreq(pair) + 0.1 * static_cast<double>(b);
      return length * (sine ? std::sin(angle) : std::cos(angle));
    };
    if (c.angles == Angles::kPacked) {
      Tensor* tensor = NewContiguous("cos_sin", c.table_dtype, {rows(), c.rotary_dim});
      EachElement(tensor, [&](uint8_t* at, int64_t n) {
        const int64_t column = n % c.rotary_dim;
        StoreNumber(c.table_dtype, number(0, n / c.rotary_dim, column % pairs(), column >= pairs()), at);
      });
      a.cos_sin = &tensor->on_host;
      return {};
    }
    for (const bool sine : {false, true}) {
      const char* name = sine ? "sin" : "cos";
      const bool wide = c.angles == Angles::kFullWidth || c.angles == Angles::kRepeated;
      const int64_t width = wide ? c.rotary_dim : pairs();
      Buffer* buffer = NewBuffer(name, batch * rows() * width * TypeFor(c.table_dtype).bits / 8);
      std::vector<int64_t> shape = {rows(), pairs()}, strides = {width, c.angles == Angles::kRepeated ? 2 : 1};
      if (c.angles == Angles::kTransposed) strides = {1, rows()};
      if (c.angles == Angles::kPerBatch) {
        shape.insert(shape.begin(), batch);
        strides.insert(strides.begin(), rows() * width);
      }
      Tensor* tensor = NewTensor(name, buffer, c.table_dtype, shape, strides, 0);
      EachElement(tensor, [&](uint8_t* at, int64_t n) {
        const int64_t row = n / pairs();
        StoreNumber(c.table_dtype, number(row / rows(), row % rows(), n % pairs(), sine), at);
      });
      (sine ? a.sin : a.cos) = &tensor->on_host;
    }
    return {};
  }

  Status MakeFrequencies(const std::vector<int32_t>& axes) {
    int code;
    if (!c.config.empty()) {
      code = ropewalk_frequencies_from_config(c.config.c_str(), c.model.c_str(),
                                              c.layer_type.empty() ? nullptr : c.layer_type.c_str(), c.sequence_length,
                                              &call.frequencies_);
    } else if (c.axes != Axes::kNone && !c.axes_dtype) {
      std::vector<double> inv_freq;
      for (int64_t pair = 0; pair < pairs(); ++pair) inv_freq.push_back(InvFreq(pair));
      code = ropewalk_frequencies_from_array(inv_freq.data(), pairs(), 1.0, axes.data(), &call.frequencies_);
    } else {
      code = ropewalk_frequencies_create(c.theta, c.rotary_dim, c.scaling.empty() ? nullptr : c.scaling.c_str(),
                                         c.sequence_length, &call.frequencies_);
    }
    if (code != ROPEWALK_OK) return {static_cast<ropewalk_code>(code), ropewalk_last_error()};
    call.host_args_.frequencies = call.frequencies_;
    return {};
  }

  // How many rows of positions there are; 0: one for all pairs, without the dimension.
  int64_t AxisCount() const {
    if (c.axes == Axes::kTwo) return 2;
    if (c.axes != Axes::kNone) return 3;
    const int32_t* axes = call.frequencies_ ? ropewalk_frequencies_axes(call.frequencies_) : nullptr;
    return axes ? 1 + *std::max_element(axes, axes + pairs()) : 0;
  }

  int64_t PositionOf(int64_t axis, int64_t batch, int64_t token) {
    switch (c.positions) {
      case Positions::kNone: return token;
      case Positions::kArange: return token + 5 * axis + 3 * batch;
      case Positions::kRandom: return random.Below(table() ? rows() : 4096);
      case Positions::kListed: {
        const int64_t n = token + axis;
        return n / 8 % 2 ? -kListedPositions[n % 8] : kListedPositions[n % 8];
      }
    }
    return 0;
  }

  static bool BadToken(int64_t token) { return token % 3 == 1; }

  void MakePositions() {
    ropewalk_rope_args& a = call.host_args_;
    const int64_t batch = c.batch && !c.positions_broadcast ? c.batch : 1;
    const int64_t axes = AxisCount(), axis_rows = std::max<int64_t>(axes, 1);
    std::vector<int64_t> shape;
    if (axes) shape.push_back(axes);
    if (c.batch) shape.push_back(batch);
    shape.push_back(c.tokens);
    std::vector<int64_t> positions, offsets;
    for (int64_t axis = 0; axis < axis_rows; ++axis) {
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t t = 0; t < c.tokens; ++t) {
          int64_t position = PositionOf(axis, b, t);
          if ((c.bad == Bad::kPosition || c.bad == Bad::kPaddedPosition) && BadToken(t)) {
            constexpr int64_t kPast[] = {-1, 2147483647, -2147483647};
            position = t == 1 ? rows() : kPast[t % 3];
          }
          // Offsets toward zero, so that positions keep their dtype's range.
          if (c.offsets_dtype) {
            if (axis == 0) {
              const int64_t offset = c.positions == Positions::kListed && axes ? 0 : random.Below(50);
              offsets.push_back(position >= 0 ? offset : -offset);
            }
            if (c.positions != Positions::kNone) position -= offsets[static_cast<size_t>(b * c.tokens + t)];
          }
          positions.push_back(position);
        }
      }
    }
    if (c.positions != Positions::kNone) {
      Tensor* tensor = NewContiguous("positions", c.positions_dtype, shape);
      FillIntegers(tensor, positions);
      a.positions = &tensor->on_host;
    }
    if (c.offsets_dtype) {
      if (axes) shape.erase(shape.begin());
      Tensor* tensor = NewContiguous("offsets", c.offsets_dtype, shape);
      FillIntegers(tensor, offsets);
      a.offsets = &tensor->on_host;
    }
  }

  // ---- the store

  void MakeStore() {
    if (c.cache == Cache::kNone) return;
    ropewalk_rope_args& a = call.host_args_;
    const int64_t tokens = std::max<int64_t>(c.batch, 1) * c.tokens;
    const int64_t page = c.cache == Cache::kFlat ? tokens + 5 : c.page_size;
    const int64_t pages = c.cache == Cache::kFlat ? 1 : (tokens + 5) / page + 1;
    const auto cache = [&](const char* name, int64_t dim) {
      std::vector<int64_t> shape = {pages, page, c.k_heads, dim}, strides = Contiguous(shape);
      if (c.cache == Cache::kHnd) strides = {page * c.k_heads * dim, dim, page * dim, 1};
      Buffer* buffer = NewBuffer(name, Product(shape) * TypeFor(c.cache_dtype).bits / 8);
      if (c.cache == Cache::kFlat) {
        shape.erase(shape.begin());
        strides.erase(strides.begin());
      }
      Tensor* tensor = NewTensor(name, buffer, c.cache_dtype, shape, strides, 0);
      const int64_t item = TypeFor(c.cache_dtype).bits / 8;
      EachElement(tensor, [&](uint8_t* at, int64_t) {
        const uint64_t bits = random.Next();
        std::memcpy(at, &bits, static_cast<size_t>(item));
      });
      return &tensor->on_host;
    };
    if (c.store_k) a.k_cache = cache("k_cache", c.head_dim);
    if (c.store_v) a.v_cache = cache("v_cache", c.v_dim);

    // A shuffle, so that every page is met in part and out of order.
    const int64_t slots = pages * page;
    std::vector<int64_t> order(static_cast<size_t>(slots));
    for (int64_t i = 0; i < slots; ++i) order[static_cast<size_t>(i)] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Next() % i]);
    order.resize(static_cast<size_t>(tokens));
    for (int64_t i = 0; i < tokens; ++i) {
      int64_t& slot = order[static_cast<size_t>(i)];
      if (c.slots == Slots::kNothing || (c.slots == Slots::kSkips && i % 3 == 2)) slot = i % 2 ? -1 : -1 - i;
      if (c.bad == Bad::kSlot && BadToken(i)) slot = i == 1 ? slots : slots + 1000000 * i;
      if (c.bad == Bad::kPaddedPosition && BadToken(i % c.tokens)) slot = -1;
    }
    std::vector<int64_t> shape = {c.tokens};
    if (c.batch) shape.insert(shape.begin(), c.batch);
    Tensor* tensor = NewContiguous("slots", c.slots_dtype, shape);
    FillIntegers(tensor, order);
    a.slots = &tensor->on_host;

    if (c.scale == Scale::kNone) return;
    const auto scale = [&](const char* name, double first) {
      std::vector<int64_t> sizes;
      if (c.scale == Scale::kTensor) sizes = {1};
      if (c.scale == Scale::kPerHead) sizes = {c.k_heads};
      Tensor* made = NewContiguous(name, kF32, sizes);
      EachElement(made,
                  [&](uint8_t* at, int64_t n) { StoreNumber(kF32, first * (1.0 + 0.3 * static_cast<double>(n)), at); });
      return &made->on_host;
    };
    if (c.store_k) a.k_scale = scale("k_scale", 0.37);
    if (c.store_v) a.v_scale = scale("v_scale", 0.5);
  }

  // ---- all of it

  Status Make() {
    ropewalk_rope_args& a = call.host_args_;
    a.pairing = c.pairing;
    a.inverse = c.inverse;
    a.k_store_only = c.k_store_only;
    a.rounding = c.rounding;
    a.norm = c.norm ? ROPEWALK_NORM_RMS : ROPEWALK_NORM_NONE;
    a.zero_centered_weight = c.weight == Weight::kZeroCentered;
    a.eps = c.eps;
    a.rotary_offset = static_cast<int32_t>(c.rotary_offset);
    if (random.Below(2)) a.rotary_dim = static_cast<int32_t>(c.rotary_dim);
    MakeHeads();
    MakeWeights();
    if (call.backward_) MakeWeightGradients();
    ROPEWALK_TRY(MakeAngles());
    MakePositions();
    MakeStore();
    return ToDevice();
  }

  Status ToDevice() {
    for (const auto& buffer : call.buffers_) {
      ROPEWALK_TRY(call.memory_.Allocate(buffer->initial.size(), &buffer->device));
      ROPEWALK_TRY(call.memory_.CopyIn(buffer->device, buffer->initial.data(), buffer->initial.size()));
    }
    call.args_ = call.host_args_;
    call.gradients_ = call.host_gradients_;
    call.args_.sycl_queue = call.memory_.sycl_queue();
    for (const auto& tensor : call.tensors_) {
      tensor->on_device = tensor->on_host;
      const ptrdiff_t at = static_cast<const uint8_t*>(tensor->on_host.data) - tensor->buffer->initial.data();
      tensor->on_device.data = static_cast<uint8_t*>(tensor->buffer->device) + at;
      tensor->on_device.device = call.memory_.device();
#ifdef ROPEWALK_POISONS
      tensor->buffer->covered.resize(tensor->buffer->initial.size());
      const int64_t item = tensor->on_host.dtype.bits / 8;
      EachElement(tensor.get(), [&](const uint8_t* element, int64_t) {
        const auto byte = static_cast<size_t>(element - tensor->buffer->initial.data());
        for (size_t i = 0; i < static_cast<size_t>(item); ++i) tensor->buffer->covered[byte + i] = true;
      });
#endif
    }
    for (const Arg& arg : RopeDescription()) {
      if (arg.kind != Kind::kTensor) continue;
      auto* const field = reinterpret_cast<DLTensor**>(reinterpret_cast<char*>(&call.args_) + arg.offset);
      const bool on_host = (arg.flags & kHostScalar) && c.scale == Scale::kHost;
      for (const auto& tensor : call.tensors_) {
        if (*field == &tensor->on_host && !on_host) *field = &tensor->on_device;
      }
    }
    for (const Arg& arg : RopeBackwardDescription().first(kRopeGradients)) {
      auto* const field = reinterpret_cast<DLTensor**>(reinterpret_cast<char*>(&call.gradients_) + arg.offset -
                                                       offsetof(RopeBackwardArgs, gradients));
      for (const auto& tensor : call.tensors_) {
        if (*field == &tensor->on_host) *field = &tensor->on_device;
      }
    }
    return {};
  }
};

Status CaseCall::Make(const RopeCase& c, DeviceMemory& memory, bool backward, std::unique_ptr<CaseCall>* out) {
  std::unique_ptr<CaseCall> call(new CaseCall(c, memory, backward));
  if (call->case_.rotary_dim == 0) call->case_.rotary_dim = c.head_dim;
  if ((c.cache != Cache::kNone || c.v_behind) && c.v_dim == 0) call->case_.v_dim = c.head_dim;
  Builder builder{*call, call->case_, NamedRandom(c.name)};
  ROPEWALK_TRY(builder.Make());
  *out = std::move(call);
  return {};
}

Status CaseCall::Make(const RopeCase& c, DeviceMemory& memory, std::unique_ptr<CaseCall>* out) {
  return Make(c, memory, false, out);
}
Status CaseCall::MakeBackward(const RopeCase& c, DeviceMemory& memory, std::unique_ptr<CaseCall>* out) {
  ROPEWALK_TRY(Make(c, memory, true, out));
  return (*out)->MakeWorkspace("workspace");
}

// Of as many elements as the call says, and not one more, from any element of a line of memory on.
Status CaseCall::MakeWorkspace(std::string_view name) {
  const int64_t needed = ropewalk_rope_backward_workspace(&args_, &gradients_);
  if (needed < 0) return Status::Invalid(ropewalk_last_error());
  if (needed == 0) return {};
  Builder builder{*this, case_, NamedRandom(name)};
  const int64_t first = static_cast<int64_t>(case_.tokens % 8);
  Tensor* tensor = builder.NewTensor(std::string(name), builder.NewBuffer(std::string(name), 4 * (first + needed)),
                                     kF32, {needed}, {1}, first);
  Buffer& buffer = *tensor->buffer;
  ROPEWALK_TRY(memory_.Allocate(buffer.initial.size(), &buffer.device));
  ROPEWALK_TRY(memory_.CopyIn(buffer.device, buffer.initial.data(), buffer.initial.size()));
  tensor->on_device = tensor->on_host;
  tensor->on_device.data = static_cast<uint8_t*>(buffer.device) + tensor->first;
  tensor->on_device.device = memory_.device();
  gradients_.workspace = &tensor->on_device;
  host_gradients_.workspace = &tensor->on_host;
  return {};
}

}  // namespace ropewalk
