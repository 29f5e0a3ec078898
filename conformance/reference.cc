// SPDX-License-Identifier: Apache-2.0
#include "conformance/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "frequencies/frequencies.h"
#include "rope/params.h"

namespace ropewalk {
namespace {

struct Format {
  int precision;     // bits of the significand, the hidden one included
  int min_exponent;  // of the smallest normal number
  double max;
  bool saturates;
};

Format FormatOf(uint32_t dtype) {
  switch (dtype) {
    case kF32: return {24, -126, std::numeric_limits<float>::max(), false};
    case kF16: return {11, -14, 65504.0, false};
    case kBF16: return {8, -126, 0x1.FEp127, false};
    case kE4M3: return {4, -6, 448.0, true};
    default: return {3, -14, 57344.0, true};  // e5m2
  }
}

// 2^n for a normal double.
double PowerOfTwo(int n) { return std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52); }
// floor(log2 |value|); of subnormal doubles, something below all formats' exponents.
int Exponent(double value) { return static_cast<int>(std::bit_cast<uint64_t>(value) >> 52 & 0x7FF) - 1023; }

int64_t Stride(const DLTensor& tensor, int dim) {
  if (tensor.strides) return tensor.strides[dim];
  int64_t stride = 1;
  for (int i = dim + 1; i < tensor.ndim; ++i) stride *= tensor.shape[i];
  return stride;
}

uint32_t TypeOf(const DLTensor& tensor) { return DtypeOf(tensor.dtype); }

const char* Element(const DLTensor& tensor, int64_t offset) {
  return static_cast<const char*>(tensor.data) + tensor.byte_offset + offset * (tensor.dtype.bits / 8);
}

// A dimension of size 1 serves every index.
int64_t Offset(const DLTensor& tensor, int dim, int64_t index) {
  return tensor.shape[dim] == 1 ? 0 : index * Stride(tensor, dim);
}

double Number(const DLTensor& tensor, int64_t offset) { return LoadNumber(TypeOf(tensor), Element(tensor, offset)); }
int64_t Integer(const DLTensor& tensor, int64_t offset) { return LoadInteger(TypeOf(tensor), Element(tensor, offset)); }

// [batch?, tokens], the batch perhaps absent or of size 1, the tokens perhaps of size 1.
int64_t TokenInteger(const DLTensor& tensor, int64_t batch, int64_t token) {
  const int last = tensor.ndim - 1;
  return Integer(tensor, Offset(tensor, last, token) + (last > 0 ? Offset(tensor, last - 1, batch) : 0));
}

double F32(double value) { return RoundNumber(kF32, value); }

// A number that the chain of roundings knows only to within a last bit or so.
struct Range {
  double value = 0, low = 0, high = 0;
  bool single() const { return low == high; }
};

Range Around(double value, double low, double high) { return {value, std::min(low, high), std::max(low, high)}; }

// What one token is rotated by.
struct Rotation {
  std::vector<Range> cos, sin;  // [pairs]
  bool bad_position = false, bad_axis = false;
};

class Reference {
 public:
  explicit Reference(const ropewalk_rope_args& args) : a_(args) {
    batched_ = a_.q->ndim == 4;
    type_ = TypeOf(*a_.q);
    head_dim_ = a_.q->shape[a_.q->ndim - 1];
    rotary_dim_ = a_.rotary_dim    ? a_.rotary_dim
                  : a_.frequencies ? a_.frequencies->rotary_dim
                  : a_.cos_sin     ? a_.cos_sin->shape[a_.cos_sin->ndim - 1]
                                   : 2 * a_.cos->shape[a_.cos->ndim - 1];
    pairs_ = rotary_dim_ / 2;
    norm_ = a_.norm == ROPEWALK_NORM_RMS || a_.q_weight;
    chain_ = a_.rounding == ROPEWALK_ROUND_REFERENCE;
    tolerance_ = type_ == kF32 ? 0x1p-21 : 0x1p-20;
    const DLTensor* table = a_.cos_sin ? a_.cos_sin : a_.cos;
    arithmetic_ = !table || TypeOf(*table) == type_ ? type_ : kF32;
  }

  int64_t batch() const { return batched_ ? a_.q->shape[0] : 1; }
  int64_t tokens() const { return a_.q->shape[a_.q->ndim - 3]; }

  ReferenceFault Token(int64_t batch, int64_t token, const RowVisitor& visit) {
    visit_ = &visit;
    batch_ = batch;
    token_ = token;
    const Rotation rotation = RotationOf();
    const int64_t slots = SlotCount();
    const int64_t slot = a_.slots ? TokenInteger(*a_.slots, batch, token) : -1;
    const ReferenceFault here = {batch * tokens() + token, kRopeFaultNone};
    const auto fault = [&](int32_t kind) { return ReferenceFault{here.token, kind}; };
    if (rotation.bad_axis) {
      Poison();
      return fault(kRopeFaultAxis);
    }
    if (rotation.bad_position) {
      if (a_.slots && slot < 0) {  // padding: left out altogether
        LeaveOut();
        return {};
      }
      Poison();
      return fault(kRopeFaultPosition);
    }
    Rotate(RopeOutput::kQ, *a_.q, a_.q_weight, rotation, -1);
    const int64_t stored = slot >= 0 && slot < slots ? slot : -1;
    if (a_.k) Rotate(RopeOutput::kK, *a_.k, a_.k_weight, rotation, stored);
    if (a_.v && stored >= 0) StoreV(stored);
    return slot >= slots && a_.slots ? fault(kRopeFaultSlot) : ReferenceFault{};
  }

  // The gradient of the heads of q or of k of a token, of the call with the gradient for q and k that is the other way
  // round; `x` is before the norm.
  ReferenceFault TokenGradient(int64_t batch, int64_t token, const RowVisitor& visit, RopeOutput output,
                               const DLTensor& x, ReferenceWeightGrad* weight_grad) {
    visit_ = &visit;
    batch_ = batch;
    token_ = token;
    const Rotation rotation = RotationOf();
    const DLTensor& grad = output == RopeOutput::kQ ? *a_.q : *a_.k;
    const DLTensor* weight = output == RopeOutput::kQ ? a_.q_weight : a_.k_weight;
    if (rotation.bad_axis || rotation.bad_position) {
      row_.assign(static_cast<size_t>(head_dim_), {.want = Expected::Want::kNan});
      for (int64_t head = 0; head < x.shape[x.ndim - 2]; ++head) Visit(output, batch_, token_, head);
      return {batch * tokens() + token, rotation.bad_axis ? kRopeFaultAxis : kRopeFaultPosition};
    }
    for (int64_t head = 0; head < x.shape[x.ndim - 2]; ++head)
      HeadGradient(output, x, grad, weight, rotation, head, weight_grad);
    return {};
  }

 private:
  void HeadGradient(RopeOutput output, const DLTensor& x_tensor, const DLTensor& grad, const DLTensor* weight,
                    const Rotation& rotation, int64_t head, ReferenceWeightGrad* weight_grad) {
    const auto dim = static_cast<size_t>(head_dim_);
    const double elements = static_cast<double>(head_dim_);
    std::vector<double> n(dim), g(dim), w(dim), size(dim), angle_error(dim, 0.0);
    double square = 0;
    for (size_t i = 0; i < dim; ++i) {
      const auto at = static_cast<int64_t>(i);
      n[i] = Number(x_tensor, RowOffset(x_tensor, batch_, token_, head) + at);
      g[i] = Number(grad, RowOffset(grad, batch_, token_, head) + at);
      size[i] = std::abs(g[i]);
      w[i] = (weight ? Number(*weight, Offset(*weight, 0, at)) : 1.0) + (a_.zero_centered_weight ? 1.0 : 0.0);
      square += n[i] * n[i];
    }
    const double rstd = 1.0 / std::sqrt(square / elements + a_.eps);
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      const auto p = static_cast<size_t>(pair);
      const bool neox = a_.pairing == ROPEWALK_NEOX;
      const auto i = static_cast<size_t>(a_.rotary_offset + (neox ? pair : 2 * pair));
      const auto j = static_cast<size_t>(a_.rotary_offset + (neox ? pair + pairs_ : 2 * pair + 1));
      const Range &c = rotation.cos[p], &s = rotation.sin[p];
      const double gi = g[i], gj = g[j];
      g[i] = gi * c.value - gj * s.value;
      g[j] = gj * c.value + gi * s.value;
      // As in the call, an error is a fraction of the pair's length: a sine is not exact where it is small.
      size[i] = size[j] = std::hypot(gi, gj) * std::hypot(c.value, s.value);
      // Reference rounding rounds computed cosines, and one next to a midpoint may go either way.
      angle_error[i] = std::abs(gi) * (c.high - c.low) + std::abs(gj) * (s.high - s.low);
      angle_error[j] = std::abs(gj) * (c.high - c.low) + std::abs(gi) * (s.high - s.low);
    }
    double along = 0, along_error = 0;
    for (size_t i = 0; i < dim; ++i) {
      n[i] *= rstd;
      along += g[i] * w[i] * n[i] / elements;
      along_error += angle_error[i] * std::abs(w[i] * n[i]) / elements;
    }
    // Errors are fractions of the head's largest term: where all of them cancel, nothing else is known.
    double largest = 0;
    for (size_t i = 0; i < dim; ++i) {
      largest = std::max(largest, rstd * (size[i] * std::abs(w[i]) + std::abs(n[i] * along)));
    }
    row_.assign(dim, {});
    for (size_t i = 0; i < dim; ++i) {
      const double value = rstd * (g[i] * w[i] - n[i] * along);
      const double error = 0x1p-18 * largest + rstd * (angle_error[i] * std::abs(w[i]) + std::abs(n[i]) * along_error);
      // Roundings among the subnormal numbers are multiplied by 1 / rms.
      row_[i] = Stored(type_, WithError(value, error + rstd * 0x1p-147), value);
      if (!weight_grad) continue;
      weight_grad->value[i] += g[i] * n[i];
      weight_grad->magnitude[i] += (size[i] + 0x1p20 * angle_error[i]) * std::abs(n[i]);
    }
    Visit(output, batch_, token_, head);
  }

  // ---- angles

  Rotation RotationOf() const {
    Rotation rotation;
    rotation.cos.resize(static_cast<size_t>(pairs_));
    rotation.sin.resize(static_cast<size_t>(pairs_));
    const bool mapped = a_.axes || (a_.frequencies && !a_.frequencies->axes.empty());
    const bool rows = mapped && a_.positions && a_.positions->ndim == (batched_ ? 3 : 2);
    for (int64_t pair = 0; pair < pairs_; ++pair) {
      const auto i = static_cast<size_t>(pair);
      int64_t position = token_;
      if (rows) {
        const int64_t axis = a_.axes ? Integer(*a_.axes, Offset(*a_.axes, 0, pair)) : a_.frequencies->axes[i];
        if (axis < 0 || axis >= a_.positions->shape[0]) {
          rotation.bad_axis = true;
          return rotation;
        }
        int64_t offset = axis * Stride(*a_.positions, 0) + Offset(*a_.positions, a_.positions->ndim - 1, token_);
        if (batched_) offset += Offset(*a_.positions, 1, batch_);
        position = Integer(*a_.positions, offset);
      } else if (a_.positions) {
        position = TokenInteger(*a_.positions, batch_, token_);
      }
      if (a_.offsets) {  // wraps
        position = static_cast<int64_t>(static_cast<uint64_t>(position) +
                                        static_cast<uint64_t>(TokenInteger(*a_.offsets, batch_, token_)));
      }
      if (a_.frequencies) {
        const long double angle = static_cast<long double>(position) * a_.frequencies->exact[i];
        const auto scaling = static_cast<long double>(a_.frequencies->attention_scaling);
        rotation.cos[i] = Computed(static_cast<double>(std::cos(angle) * scaling));
        rotation.sin[i] = Computed(static_cast<double>(std::sin(angle) * scaling));
      } else {
        const DLTensor& cos = a_.cos_sin ? *a_.cos_sin : *a_.cos;
        const DLTensor& sin = a_.cos_sin ? *a_.cos_sin : *a_.sin;
        if (position < 0 || position >= cos.shape[cos.ndim - 2]) {
          rotation.bad_position = true;
          continue;  // a bad axis counts first
        }
        const double c = TableNumber(cos, position, pair);
        const double s = TableNumber(sin, position, pair + (a_.cos_sin ? pairs_ : 0));
        rotation.cos[i] = {c, c, c};
        rotation.sin[i] = {s, s, s};
      }
      if (a_.inverse) {
        const Range s = rotation.sin[i];
        rotation.sin[i] = {-s.value, -s.high, -s.low};
      }
    }
    return rotation;
  }

  double TableNumber(const DLTensor& table, int64_t row, int64_t column) const {
    int64_t offset = row * Stride(table, table.ndim - 2) + column * Stride(table, table.ndim - 1);
    if (table.ndim == 3) offset += Offset(table, 0, batch_);
    return Number(table, offset);
  }

  // The chain rounds a computed cosine to T; one next to a midpoint may go either way.
  Range Computed(double value) const {
    if (!chain_) return {value, value, value};
    const double error = 0x1p-21 * a_.frequencies->attention_scaling;
    return {RoundNumber(type_, value), RoundNumber(type_, value - error), RoundNumber(type_, value + error)};
  }

  // ---- one head

  const DLTensor& Written(RopeOutput output) const { return *OutputTensor(a_, output); }

  void Visit(RopeOutput output, int64_t outer, int64_t token, int64_t head) {
    (*visit_)({output, outer, token, head, row_});
  }

  static bool OutOfPlace(const ropewalk_rope_args& a, RopeOutput output) {
    return output == RopeOutput::kQ ? a.q_out != nullptr : a.k_out != nullptr;
  }

  // Whether the rows of q or k are written back.
  bool WrittenBack(RopeOutput output) const { return output == RopeOutput::kQ || !a_.k_store_only; }

  void Rotate(RopeOutput output, const DLTensor& input, const DLTensor* weight, const Rotation& rotation,
              int64_t slot) {
    const int64_t heads = input.shape[input.ndim - 2];
    const auto dim = static_cast<size_t>(head_dim_);
    std::vector<Range> x(dim);
    std::vector<Expected> values(dim);  // before the rounding of the store
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = RowOffset(input, batch_, token_, head);
      for (size_t i = 0; i < dim; ++i) {
        const double value = Number(input, first + static_cast<int64_t>(i));
        x[i] = {value, value, value};
      }
      if (norm_) Normalise(weight, &x);

      // What is not rotated: numbers if normalised, else bits.
      exact_.assign(dim, {});
      for (size_t i = 0; i < dim; ++i) {
        if (norm_) {
          exact_[i] = chain_ ? x[i] : WithError(x[i].value, tolerance_ * std::abs(x[i].value));
        } else {
          exact_[i] = x[i];
        }
      }
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const bool neox = a_.pairing == ROPEWALK_NEOX;
        const auto i = static_cast<size_t>(a_.rotary_offset + (neox ? pair : 2 * pair));
        const auto j = static_cast<size_t>(a_.rotary_offset + (neox ? pair + pairs_ : 2 * pair + 1));
        RotatePair(x[i], x[j], rotation.cos[static_cast<size_t>(pair)], rotation.sin[static_cast<size_t>(pair)],
                   &exact_[i], &exact_[j]);
      }

      row_.assign(dim, {});
      for (size_t i = 0; i < dim; ++i) {
        row_[i] = Touched(i) ? Stored(type_, exact_[i]) : Copied(input, first, i, OutOfPlace(a_, output));
      }
      if (WrittenBack(output)) Visit(output, batch_, token_, head);
      if (slot >= 0 && output == RopeOutput::kK && a_.k_cache) {
        const uint32_t cache_type = TypeOf(*a_.k_cache);
        const double scale = ScaleOf(a_.k_scale, head);
        for (size_t i = 0; i < dim; ++i) {
          if (cache_type == type_) {
            row_[i] = Touched(i) ? Stored(type_, exact_[i]) : Copied(input, first, i, true);
          } else {
            row_[i] = Quantised(cache_type, exact_[i], scale);
          }
        }
        VisitSlot(RopeOutput::kKCache, slot, head);
      }
    }
  }

  bool Touched(size_t i) const {
    const auto place = static_cast<int64_t>(i) - a_.rotary_offset;
    return norm_ || (place >= 0 && place < rotary_dim_);
  }

  void Normalise(const DLTensor* weight, std::vector<Range>* x) const {
    double sum = 0;
    for (const Range& element : *x) sum += element.value * element.value;
    const double mean = sum / static_cast<double>(head_dim_);
    const double scale = 1.0 / std::sqrt(mean + a_.eps);
    const double chain_scale = F32(1.0 / std::sqrt(F32(F32(mean) + F32(a_.eps))));
    for (int64_t i = 0; i < head_dim_; ++i) {
      Range& element = (*x)[static_cast<size_t>(i)];
      const double w = weight ? Number(*weight, Offset(*weight, 0, i)) : 1.0;
      if (!chain_) {
        const double value = element.value * scale * (a_.zero_centered_weight ? 1.0 + w : w);
        element = {value, value, value};
        continue;
      }
      // The order of the float32 sum is free: what the number is multiplied by may differ by some last bits.
      const double normal = element.value * chain_scale;
      element = Around(Chain(F32(normal), weight, w), Chain(F32(normal * (1 - 0x1p-21)), weight, w),
                       Chain(F32(normal * (1 + 0x1p-21)), weight, w));
    }
  }

  // From float32 on, as Llama and Qwen3 do, or with zero-centred weights as Gemma does.
  double Chain(double normal, const DLTensor* weight, double w) const {
    if (!weight) return RoundNumber(type_, normal);
    if (a_.zero_centered_weight) return RoundNumber(type_, F32(normal * F32(1.0 + w)));
    return RoundNumber(type_, F32(RoundNumber(type_, normal) * w));
  }

  void RotatePair(const Range& x, const Range& y, const Range& c, const Range& s, Range* x_out, Range* y_out) const {
    if (!chain_) {
      const double square = (x.value * x.value + y.value * y.value) * (c.value * c.value + s.value * s.value);
      const double error = tolerance_ * std::sqrt(square);
      *x_out = WithError(x.value * c.value - y.value * s.value, error);
      *y_out = WithError(y.value * c.value + x.value * s.value, error);
      return;
    }
    *x_out = ChainSum(x, c, {-y.value, -y.high, -y.low}, s);
    *y_out = ChainSum(y, c, x, s);
  }

  // a * b + c * d, each operation rounded; the result is monotonous in each of the four, so corners bound it.
  Range ChainSum(const Range& a, const Range& b, const Range& c, const Range& d) const {
    const auto sum = [this](double p, double q, double r, double t) {
      const auto round = [this](double value) { return RoundNumber(arithmetic_, F32(value)); };
      return RoundNumber(type_, round(round(p * q) + round(r * t)));
    };
    Range out;
    out.value = out.low = out.high = sum(a.value, b.value, c.value, d.value);
    if (a.single() && b.single() && c.single() && d.single()) return out;
    for (int corner = 0; corner < 16; ++corner) {
      const double value = sum(corner & 1 ? a.high : a.low, corner & 2 ? b.high : b.low, corner & 4 ? c.high : c.low,
                               corner & 8 ? d.high : d.low);
      out.low = std::min(out.low, value);
      out.high = std::max(out.high, value);
    }
    return out;
  }

  // Roundings among the subnormal numbers of float32, whose distance of 2^-149 is no part of a length: two of the
  // rotation, and of both its terms two of the norm, the first of them multiplied by the weight.
  Range WithError(double value, double error) const {
    if (!std::isfinite(value)) return {value, value, value};
    error += norm_ ? 0x1p-147 : 0x1p-148;
    return {value, value - error, value + error};
  }

  // Rounding keeps order: an error before it gives a number between the rounded ends.
  Expected Stored(uint32_t dtype, const Range& exact) const {
    return Stored(dtype, exact, chain_ ? RoundNumber(dtype, exact.value) : exact.value);
  }
  static Expected Stored(uint32_t dtype, const Range& exact, double value) {
    if (std::isnan(exact.value)) return {.want = Expected::Want::kNan};
    return {.want = Expected::Want::kRange,
            .value = value,
            .low = RoundNumber(dtype, exact.low),
            .high = RoundNumber(dtype, exact.high)};
  }

  Expected Quantised(uint32_t dtype, const Range& exact, double scale) const {
    Range range = exact;
    if (chain_ && !std::isnan(range.value)) {
      range = {RoundNumber(type_, range.value), RoundNumber(type_, range.low), RoundNumber(type_, range.high)};
    }
    // Dividing by a power of two is exact, else it may be off by a last bit of float32 or two.
    int exponent;
    if (std::frexp(scale, &exponent) != 0.5 && std::isfinite(range.value)) {
      range.low -= 0x1p-22 * std::abs(range.low);
      range.high += 0x1p-22 * std::abs(range.high);
    }
    return Stored(dtype, {range.value / scale, range.low / scale, range.high / scale});
  }

  Expected Copied(const DLTensor& input, int64_t first, size_t i, bool copied) const {
    if (!copied) return {};
    Expected expected = {.want = Expected::Want::kBits};
    std::memcpy(&expected.bits, Element(input, first + static_cast<int64_t>(i)), input.dtype.bits / 8);
    return expected;
  }

  // ---- tokens that are not rotated

  void EachHead(const std::function<void(RopeOutput, const DLTensor&, int64_t)>& body) const {
    for (int64_t head = 0; head < a_.q->shape[a_.q->ndim - 2]; ++head) body(RopeOutput::kQ, *a_.q, head);
    if (!a_.k || !WrittenBack(RopeOutput::kK)) return;
    for (int64_t head = 0; head < a_.k->shape[a_.k->ndim - 2]; ++head) body(RopeOutput::kK, *a_.k, head);
  }

  void Poison() {
    row_.assign(static_cast<size_t>(head_dim_), {.want = Expected::Want::kNan});
    EachHead([this](RopeOutput output, const DLTensor&, int64_t head) { Visit(output, batch_, token_, head); });
  }

  void LeaveOut() {
    EachHead([this](RopeOutput output, const DLTensor& input, int64_t head) {
      row_.assign(static_cast<size_t>(head_dim_), {});
      for (size_t i = 0; i < row_.size(); ++i) {
        row_[i] = Copied(input, RowOffset(input, batch_, token_, head), i, OutOfPlace(a_, output));
      }
      Visit(output, batch_, token_, head);
    });
  }

  // ---- the store

  int64_t SlotCount() const {
    const DLTensor* cache = a_.k_cache ? a_.k_cache : a_.v_cache;
    return !cache ? 0 : cache->ndim == 4 ? cache->shape[0] * cache->shape[1] : cache->shape[0];
  }

  void VisitSlot(RopeOutput output, int64_t slot, int64_t head) {
    const DLTensor& cache = Written(output);
    const int64_t page_size = cache.ndim == 4 ? cache.shape[1] : cache.shape[0];
    Visit(output, slot / page_size, slot % page_size, head);
  }

  static double ScaleOf(const DLTensor* scale, int64_t head) {
    if (!scale) return 1.0;
    return Number(*scale, scale->ndim == 0 ? 0 : Offset(*scale, 0, head));
  }

  void StoreV(int64_t slot) {
    const DLTensor& v = *a_.v;
    const uint32_t cache_type = TypeOf(*a_.v_cache);
    for (int64_t head = 0; head < v.shape[v.ndim - 2]; ++head) {
      const int64_t first = RowOffset(v, batch_, token_, head);
      row_.assign(static_cast<size_t>(v.shape[v.ndim - 1]), {});
      for (size_t i = 0; i < row_.size(); ++i) {
        const double value = Number(v, first + static_cast<int64_t>(i));
        row_[i] = cache_type == type_ ? Copied(v, first, i, true)
                                      : Quantised(cache_type, {value, value, value}, ScaleOf(a_.v_scale, head));
      }
      VisitSlot(RopeOutput::kVCache, slot, head);
    }
  }

  const ropewalk_rope_args& a_;
  bool batched_ = false, norm_ = false, chain_ = false;
  uint32_t type_ = 0, arithmetic_ = 0;
  int64_t head_dim_ = 0, rotary_dim_ = 0, pairs_ = 0;
  double tolerance_ = 0;  // of the rotated pair's length
  const RowVisitor* visit_ = nullptr;
  int64_t batch_ = 0, token_ = 0;
  std::vector<Range> exact_;   // of one head, before the store's rounding
  std::vector<Expected> row_;  // after it
};

}  // namespace

const char* OutputName(const ropewalk_rope_args& args, RopeOutput output) {
  switch (output) {
    case RopeOutput::kQ: return args.q_out ? "q_out" : "q";
    case RopeOutput::kK: return args.k_out ? "k_out" : "k";
    case RopeOutput::kKCache: return "k_cache";
    case RopeOutput::kVCache: return "v_cache";
  }
  return "";
}

DLTensor* OutputTensor(const ropewalk_rope_args& args, RopeOutput output) {
  switch (output) {
    case RopeOutput::kQ: return args.q_out ? args.q_out : args.q;
    case RopeOutput::kK: return args.k_out ? args.k_out : args.k;
    case RopeOutput::kKCache: return args.k_cache;
    case RopeOutput::kVCache: return args.v_cache;
  }
  return nullptr;
}

int64_t RowOffset(const DLTensor& tensor, int64_t outer, int64_t token, int64_t head) {
  const int last = tensor.ndim - 1;
  int64_t offset = head * Stride(tensor, last - 1) + token * Stride(tensor, last - 2);
  if (tensor.ndim == 4) offset += outer * Stride(tensor, 0);
  return offset;
}

ReferenceFault RopeReference(const ropewalk_rope_args& args, const RowVisitor& visit) {
  Reference reference(args);
  ReferenceFault first;
  const int64_t batches = reference.tokens() > 0 ? reference.batch() : 0;  // no tokens is no work
  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t token = 0; token < reference.tokens(); ++token) {
      const ReferenceFault fault = reference.Token(batch, token, visit);
      if (first.token < 0) first = fault;
    }
  }
  return first;
}

// The gradient. With x a head of D elements, r = 1 / sqrt(mean(x x) + eps), n = r x, the weight w (1 without one, 1 +
// weight if zero-centred) and the rotation R, the call computes y = R (n w).
//
// R is linear: it turns each rotated pair by [[c, -s], [s, c]] (c and s with the attention scaling in them, s negative
// if inverse) and leaves the other elements. So the gradient g of n w is R^T dY, which turns by [[c, s], [-s, c]].
// y depends on w_i by n_i w_i alone, hence dW_i = the sum of g_i n_i over all heads of all tokens; 1 + weight has the
// same. And dn_j = g_j w_j, with dn_j / dx_i = r [i = j] + x_j dr / dx_i, where dr / dx_i = -r^3 x_i / D:
//
//   dX_i = r g_i w_i - r^3 x_i / D sum_j(g_j w_j x_j) = r (g_i w_i - n_i mean(g w n))
//
// Without a norm dX = g: the call itself, the other way round, with its rounding.
ReferenceFault RopeBackwardReference(const ropewalk_rope_args& args, const ropewalk_rope_gradients& gradients,
                                     const RowVisitor& visit, ReferenceWeightGrad* q_weight,
                                     ReferenceWeightGrad* k_weight) {
  ropewalk_rope_args turn = args;
  turn.q = gradients.q_grad;
  turn.k = gradients.k_grad;
  turn.q_out = gradients.q_grad_out;
  turn.k_out = gradients.k_grad_out;
  turn.inverse = !args.inverse;
  if (args.norm != ROPEWALK_NORM_RMS && !args.q_weight) return RopeReference(turn, visit);

  Reference reference(turn);
  const auto dim = static_cast<size_t>(turn.q->shape[turn.q->ndim - 1]);
  for (ReferenceWeightGrad* grad : {q_weight, k_weight}) {
    if (grad) *grad = {std::vector<double>(dim, 0.0), std::vector<double>(dim, 0.0)};
  }
  ReferenceFault first;
  for (int64_t batch = 0; batch < (reference.tokens() > 0 ? reference.batch() : 0); ++batch) {
    for (int64_t token = 0; token < reference.tokens(); ++token) {
      ReferenceFault fault = reference.TokenGradient(batch, token, visit, RopeOutput::kQ, *args.q, q_weight);
      if (args.k) reference.TokenGradient(batch, token, visit, RopeOutput::kK, *args.k, k_weight);
      if (first.token < 0) first = fault;
    }
  }
  return first;
}

ReferenceFault RopeReferenceToken(const ropewalk_rope_args& args, int64_t batch, int64_t token,
                                  const RowVisitor& visit) {
  return Reference(args).Token(batch, token, visit);
}

double RoundNumber(uint32_t dtype, double value) {
  if (dtype == kF32) return static_cast<double>(static_cast<float>(value));
  if (std::isnan(value) || value == 0) return value;
  const Format format = FormatOf(dtype);
  double rounded = value;
  if (std::isfinite(value)) {
    const int exponent = std::max(Exponent(value), format.min_exponent) - (format.precision - 1);
    rounded = std::nearbyint(value * PowerOfTwo(-exponent)) * PowerOfTwo(exponent);  // in units of the last place
  }
  if (std::abs(rounded) <= format.max) return rounded;
  return std::copysign(format.saturates ? format.max : std::numeric_limits<double>::infinity(), value);
}

double LoadNumber(uint32_t dtype, const void* at) {
  if (dtype == kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return static_cast<double>(value);
  }
  if (dtype == kBF16) {
    uint16_t half;
    std::memcpy(&half, at, sizeof(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    return LoadNumber(kF32, &bits);
  }
  uint32_t bits = 0;
  std::memcpy(&bits, at, dtype == kF16 ? 2 : 1);
  const int width = dtype == kF16 ? 16 : 8;
  const int mantissa_bits = FormatOf(dtype).precision - 1;
  const uint32_t mantissa_mask = (1u << mantissa_bits) - 1;
  const uint32_t mantissa = bits & mantissa_mask;
  const uint32_t exponent_mask = (1u << (width - 1 - mantissa_bits)) - 1;
  const uint32_t exponent = bits >> mantissa_bits & exponent_mask;
  const double sign = bits >> (width - 1) & 1 ? -1.0 : 1.0;
  if (dtype == kE4M3) {  // no infinity, one NaN
    if (exponent == exponent_mask && mantissa == mantissa_mask) return std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == exponent_mask) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const int scale = FormatOf(dtype).min_exponent - mantissa_bits;
  if (exponent == 0) return sign * mantissa * PowerOfTwo(scale);
  return sign * (mantissa | (1u << mantissa_bits)) * PowerOfTwo(scale + static_cast<int>(exponent) - 1);
}

void StoreNumber(uint32_t dtype, double value, void* at) {
  const double rounded = RoundNumber(dtype, value);
  if (dtype == kF32 || dtype == kBF16) {
    const auto single = static_cast<float>(rounded);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    const auto high = static_cast<uint16_t>(bits >> 16);
    dtype == kF32 ? std::memcpy(at, &bits, 4) : std::memcpy(at, &high, 2);
    return;
  }
  const Format format = FormatOf(dtype);
  const int width = dtype == kF16 ? 16 : 8;
  const int mantissa_bits = format.precision - 1;
  uint32_t bits = std::signbit(rounded) ? 1u << (width - 1) : 0;
  const uint32_t exponent_mask = ((1u << (width - 1)) - 1) & ~((1u << mantissa_bits) - 1);
  if (std::isnan(rounded)) {
    bits |= (1u << (width - 1)) - 1;
  } else if (std::isinf(rounded)) {
    bits |= exponent_mask;
  } else if (rounded != 0) {
    const int exponent = std::max(Exponent(rounded), format.min_exponent);
    const auto significand = static_cast<uint32_t>(std::abs(rounded) * PowerOfTwo(mantissa_bits - exponent));
    const bool normal = significand >> mantissa_bits & 1;
    const auto biased = static_cast<uint32_t>(exponent - format.min_exponent + 1);
    bits |= normal ? biased << mantissa_bits | (significand & ((1u << mantissa_bits) - 1)) : significand;
  }
  std::memcpy(at, &bits, static_cast<size_t>(width / 8));
}

int64_t LoadInteger(uint32_t dtype, const void* at) {
  if (dtype == kI32) {
    int32_t value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  int64_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

}  // namespace ropewalk
