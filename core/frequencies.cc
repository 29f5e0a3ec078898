// The maths of frequencies: every scaling rule in double-double, the fixed-point turns, and Hugging Face's table.
// The rules are those of transformers' modeling_rope_utils.py; what they compute in float32 is exact here.
// SPDX-License-Identifier: Apache-2.0
#include "core/frequencies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "core/double_double.h"
#include "core/json_fields.h"
#include "core/op.h"
#include "core/overlap.h"
#include "core/rope_config.h"
#include "core/torch_pow.h"

namespace ropewalk {
namespace {

using Frequencies = ::ropewalk_frequencies;

// ---------------------------------------------------------------------------------------------------------------------
// Exact: w_i = theta^(-2i/d), then the rule

// theta' of NTK scaling is theta times this to the power d/(d-2).
DoubleDouble NtkRatio(const RopeRule& rule) {
  if (rule.type != RopeType::kDynamic) return 1.0;
  if (rule.alpha != 0) return rule.alpha;
  return DoubleDouble(rule.factor) * static_cast<double>(rule.sequence_length) /
             static_cast<double>(rule.max_position) -
         (DoubleDouble(rule.factor) - 1.0);
}

DoubleDouble LogTheta(const RopeRule& rule) {
  DoubleDouble log_theta = Log(rule.theta);
  if (rule.type == RopeType::kDynamic) {
    const auto dim = static_cast<double>(rule.rotary_dim);
    log_theta = log_theta + Log(NtkRatio(rule)) * dim / (dim - 2);
  }
  return log_theta;
}

// Yarn: the frequencies before `low` are kept, those from `high` on divided by the factor, those between are blended.
struct YarnRange {
  DoubleDouble low, high;
};
YarnRange FindYarnRange(const RopeRule& rule) {
  const auto dim = static_cast<double>(rule.rotary_dim);
  const auto index_of = [&](double rotations) {  // the frequency that turns this often in the original length
    return Log(DoubleDouble(static_cast<double>(rule.original_position)) / (kTwoPi * rotations)) * dim /
           (Log(rule.theta) * 2.0);
  };
  YarnRange range{index_of(rule.beta_fast), index_of(rule.beta_slow)};
  if (rule.truncate) range = {Floor(range.low), -Floor(-range.high)};
  range.low = std::max(range.low, DoubleDouble(0.0));
  range.high = std::min(range.high, DoubleDouble(dim - 1));
  if (!(range.low < range.high) && !(range.high < range.low)) range.high = range.high + 0.001;
  return range;
}

DoubleDouble Scaled(const RopeRule& rule, const YarnRange& yarn, int64_t i, DoubleDouble w) {
  switch (rule.type) {
    case RopeType::kDefault:
    case RopeType::kDynamic: return w;
    case RopeType::kLinear:
    case RopeType::kProportional: return w / rule.factor;
    case RopeType::kLongrope: return w / rule.divisors[static_cast<size_t>(i)];
    case RopeType::kYarn: {
      DoubleDouble ramp = (DoubleDouble(static_cast<double>(i)) - yarn.low) / (yarn.high - yarn.low);
      ramp = std::min(std::max(ramp, DoubleDouble(0.0)), DoubleDouble(1.0));
      return w * (ramp / rule.factor + (1.0 - ramp));
    }
    case RopeType::kLlama3: {
      const DoubleDouble turns = w * static_cast<double>(rule.original_position) / kTwoPi;  // in the original length
      if (turns < rule.low_freq_factor) return w / rule.factor;
      if (turns > rule.high_freq_factor || rule.high_freq_factor <= rule.low_freq_factor) return w;
      const DoubleDouble smooth =
          (turns - rule.low_freq_factor) / (DoubleDouble(rule.high_freq_factor) - rule.low_freq_factor);
      return w * ((1.0 - smooth) / rule.factor + smooth);
    }
  }
  return w;
}

// Proportional: this many frequencies, the others are zero.
int64_t Turning(const RopeRule& rule) {
  const int64_t pairs = rule.rotary_dim / 2;
  if (rule.type != RopeType::kProportional) return pairs;
  return std::min(pairs, static_cast<int64_t>(std::floor(rule.partial * static_cast<double>(rule.rotary_dim) / 2)));
}

void AppendExact(const RopeRule& rule, int64_t dim, std::vector<DoubleDouble>* out) {
  const DoubleDouble log_theta = LogTheta(rule);
  const YarnRange yarn = rule.type == RopeType::kYarn ? FindYarnRange(rule) : YarnRange{};
  for (int64_t i = 0; i < dim / 2; ++i) {
    if (i >= Turning(rule)) {
      out->push_back(0.0);
      continue;
    }
    const DoubleDouble w = Exp(-(log_theta * static_cast<double>(2 * i) / static_cast<double>(dim)));
    out->push_back(Scaled(rule, yarn, i, w));
  }
}

// round(frequency / 2 pi * 2^64) modulo 2^64.
uint64_t Turns(DoubleDouble frequency) {
  DoubleDouble turns = frequency * kInverseTwoPi;
  turns = turns - Floor(turns);  // in [0, 1]
  const double high = std::ldexp(turns.hi, 64), low = std::ldexp(turns.lo, 64);
  const double whole = std::floor(high);
  const auto rest = static_cast<int64_t>(std::floor((high - whole) + low + 0.5));
  // `whole` is at most 2^64, which is zero.
  return (whole < 0x1p64 ? static_cast<uint64_t>(whole) : 0) + static_cast<uint64_t>(rest);
}

// ---------------------------------------------------------------------------------------------------------------------
// As transformers computes them: the same operations in the same order, each rounded to float32. A double holds the
// product, and is wide enough for the sum and the quotient, of two floats, so that rounding it is rounding once.

float F(double value) { return static_cast<float>(value); }
double D(float value) { return value; }

void AppendTable(const RopeRule& rule, int64_t dim, std::vector<float>* out) {
  const int64_t turning = Turning(rule);
  double theta = rule.theta;
  if (rule.type == RopeType::kDynamic) {
    const double exponent = static_cast<double>(dim) / static_cast<double>(dim - 2);
    if (rule.alpha != 0) {
      theta *= std::pow(rule.alpha, exponent);
    } else if (rule.sequence_length >
               rule.max_position) {  // the length is a tensor there, so that even theta' is float32
      const float product = F(D(F(rule.factor)) * D(F(static_cast<double>(rule.sequence_length))));
      const float ratio = F(D(F(D(product) / D(F(static_cast<double>(rule.max_position))))) - D(F(rule.factor - 1)));
      theta = D(F(D(F(theta)) * D(F(std::pow(D(ratio), exponent)))));
    }
  }
  std::vector<float> powers(static_cast<size_t>(turning));
  for (int64_t i = 0; i < turning; ++i) {
    powers[static_cast<size_t>(i)] = F(static_cast<double>(2 * i) / static_cast<double>(dim));
  }
  TorchPow(F(theta), powers.data(), turning);

  const float factor = F(rule.factor);
  YarnRange yarn;
  float yarn_low = 0, yarn_width = 0;
  if (rule.type == RopeType::kYarn) {
    yarn = FindYarnRange(rule);
    yarn_low = F(static_cast<double>(yarn.low));
    yarn_width = F(static_cast<double>(yarn.high) - static_cast<double>(yarn.low));
  }
  for (int64_t i = 0; i < dim / 2; ++i) {
    if (i >= turning) {
      out->push_back(0);
      continue;
    }
    const float p = powers[static_cast<size_t>(i)];
    float w = F(1 / D(p));
    switch (rule.type) {
      case RopeType::kDefault:
      case RopeType::kDynamic: break;
      case RopeType::kLinear:
      case RopeType::kProportional: w = F(D(w) / D(factor)); break;
      case RopeType::kLongrope: w = F(1 / D(F(D(F(rule.divisors[static_cast<size_t>(i)])) * D(p)))); break;
      case RopeType::kYarn: {
        const float divided = F(1 / D(F(D(factor) * D(p))));
        float ramp = F(D(F(static_cast<double>(i) - D(yarn_low))) / D(yarn_width));
        ramp = std::min(std::max(ramp, 0.0f), 1.0f);
        const float keep = F(1 - D(ramp));
        w = F(D(F(D(divided) * D(F(1 - D(keep))))) + D(F(D(w) * D(keep))));
        break;
      }
      case RopeType::kLlama3: {
        const auto original = static_cast<double>(rule.original_position);
        const float low = F(rule.low_freq_factor);
        const float wavelength = F(D(F(1 / D(w))) * D(F(2 * 3.14159265358979323846)));
        const bool is_low = wavelength > F(original / rule.low_freq_factor);
        const bool is_high =
            wavelength < F(original / rule.high_freq_factor) || rule.high_freq_factor <= rule.low_freq_factor;
        if (is_low) {
          w = F(D(w) / D(factor));
        } else if (!is_high) {
          const float turns = F(D(F(1 / D(wavelength))) * D(F(original)));
          const float smooth = F(D(F(D(turns) - D(low))) / D(F(rule.high_freq_factor - rule.low_freq_factor)));
          const float divided = F(D(F(D(F(1 - D(smooth))) * D(w))) / D(factor));
          w = F(D(divided) + D(F(D(smooth) * D(w))));
        }
        break;
      }
    }
    out->push_back(w);
  }
}

Status Finish(std::unique_ptr<Frequencies> made, const std::vector<DoubleDouble>& exact, ropewalk_frequencies** out) {
  static std::atomic<uint64_t> last_id{0};
  made->rotary_dim = 2 * std::ssize(exact);
  for (const DoubleDouble& frequency : exact) {
    made->inv_freq.push_back(static_cast<double>(frequency));
    made->exact.push_back(static_cast<long double>(frequency));
    made->turns.push_back(Turns(frequency));
  }
  made->id = ++last_id;
  *out = made.release();
  return {};
}

Status FromRule(const RopeRule& rule, ropewalk_frequencies** out) {
  auto made = std::make_unique<Frequencies>();
  std::vector<DoubleDouble> exact;
  const std::vector<int64_t> dims = rule.axes_dims.empty() ? std::vector<int64_t>{rule.rotary_dim} : rule.axes_dims;
  for (const int64_t dim : dims) {
    AppendExact(rule, dim, &exact);
    if (!rule.double_table) AppendTable(rule, dim, &made->table_inv_freq);
  }
  made->attention_scaling = rule.attention_scaling;
  made->axes = rule.axes;
  made->warnings = rule.warnings;
  return Finish(std::move(made), exact, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

enum class TableType { kFloat32, kFloat16, kBfloat16 };

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even; never NaN here
}

uint16_t ToFloat16(float value) {  // |value| as cosines and sines have it, or larger: to infinity from 65520 on
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {  // subnormal: units of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  bits &= 0x7fffffff;
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((bits >> 13) - (uint32_t{127 - 15} << 10));
}

// A cosine or sine times the attention scaling, as transformers has it. There the cosine is torch's float32 one: the
// nearest float or, where the exact value lies near the middle of two, maybe the other one (it errs by up to 0.601 of a
// unit in the last place, in 5 % of the entries). Times the scaling these can be two units apart, and then the float
// between is within one of both.
float TableEntry(double exact, float scaling) {
  constexpr double kNearMiddle = 0.5 - 0.11;
  const float nearest = F(exact), product = F(D(nearest) * D(scaling));
  const float other = std::nextafter(nearest, D(nearest) < exact ? 2.0f : -2.0f);
  if (scaling == 1 || std::abs(exact - D(nearest)) < kNearMiddle * std::abs(D(other) - D(nearest))) return product;
  const float other_product = F(D(other) * D(scaling)), between = std::nextafter(product, other_product);
  return between != other_product && std::nextafter(between, other_product) == other_product ? between : product;
}

Status CheckTable(const DLTensor* tensor, const char* name, int64_t pairs, TableType* type) {
  const std::string prefix = std::string("table: ") + name;
  if (tensor == nullptr) return Status::Invalid(prefix + " is missing");
  if (DeviceType(tensor->device) != kDLCPU) {
    return Status::Invalid(prefix + " must be on the CPU, but is on " + DeviceName(tensor->device));
  }
  if (tensor->ndim != 2) {
    return Status::Invalid(prefix + " must have 2 dimensions, but has " + std::to_string(tensor->ndim));
  }
  if (tensor->shape == nullptr) return Status::Invalid(prefix + " has no shape");
  if (tensor->shape[0] < 0 || tensor->shape[1] != pairs) {
    return Status::Invalid(prefix + " must be [rows, " + std::to_string(pairs) + "], but is [" +
                           std::to_string(tensor->shape[0]) + ", " + std::to_string(tensor->shape[1]) + "]");
  }
  const DLDataType dtype = tensor->dtype;
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32) {
    *type = TableType::kFloat32;
  } else if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16) {
    *type = TableType::kFloat16;
  } else if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16) {
    *type = TableType::kBfloat16;
  } else {
    return Status::Invalid(prefix + " must be float32, float16 or bfloat16");
  }
  if (SpansTooMuch(*tensor)) {
    return Status::Invalid(prefix + " must span less than 2^62 bytes, but its shape is " + ShapeText(*tensor) +
                           (tensor->strides != nullptr ? " with larger strides" : ""));
  }
  if (tensor->shape[0] == 0) return {};
  if (tensor->data == nullptr) return Status::Invalid(prefix + " has no data");
  if (FootprintOf(*tensor).repeats()) {
    return Status::Invalid(prefix + " is written, but some of its elements share memory (overlapping strides)");
  }
  return {};
}

void Store(const DLTensor& tensor, TableType type, int64_t row, int64_t pair, float value) {
  const int64_t row_stride = tensor.strides != nullptr ? tensor.strides[0] : tensor.shape[1];
  const int64_t pair_stride = tensor.strides != nullptr ? tensor.strides[1] : 1;
  const int64_t index = row * row_stride + pair * pair_stride;
  char* base = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (type == TableType::kFloat32) {
    std::memcpy(base + index * 4, &value, 4);
  } else {
    const uint16_t half = type == TableType::kFloat16 ? ToFloat16(value) : ToBfloat16(value);
    std::memcpy(base + index * 2, &half, 2);
  }
}

}  // namespace

Status MakeFrequencies(double theta, int64_t rotary_dim, std::string_view scaling_json, int64_t sequence_length,
                       ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    RopeRule rule;
    ROPEWALK_TRY(ReadScaling(theta, rotary_dim, scaling_json, sequence_length, &rule));
    return FromRule(rule, out);
  });
}

Status FrequenciesFromArray(const double* inv_freq, int64_t count, double attention_scaling, const int32_t* axes,
                            ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    constexpr double kMaxFrequency = 1e6;
    if (count < 1 || count > kMaxRotaryDim / 2) {
      return Status::Invalid("inv_freq must have from 1 to " + std::to_string(kMaxRotaryDim / 2) +
                             " elements, but has " + std::to_string(count));
    }
    if (inv_freq == nullptr) return Status::Invalid("inv_freq is missing");
    if (!(std::fabs(attention_scaling) <= kMaxFrequency)) {
      return Status::Invalid("attention_scaling must be from -1e+06 to 1e+06, but is " + Show(attention_scaling));
    }
    auto made = std::make_unique<Frequencies>();
    std::vector<DoubleDouble> exact;
    for (int64_t i = 0; i < count; ++i) {
      if (!(std::fabs(inv_freq[i]) <= kMaxFrequency)) {
        return Status::Invalid("inv_freq[" + std::to_string(i) + "] must be from -1e+06 to 1e+06, but is " +
                               Show(inv_freq[i]));
      }
      if (axes != nullptr) {
        if (axes[i] < 0 || axes[i] >= kMaxAxes) {
          return Status::Invalid("axes[" + std::to_string(i) + "] must be from 0 to " + std::to_string(kMaxAxes - 1) +
                                 ", but is " + std::to_string(axes[i]));
        }
        made->axes.push_back(axes[i]);
      }
      exact.emplace_back(inv_freq[i]);
      made->table_inv_freq.push_back(F(inv_freq[i]));
    }
    made->attention_scaling = attention_scaling;
    return Finish(std::move(made), exact, out);
  });
}

Status FrequenciesFromTurns(const uint64_t* turns, int64_t count, double attention_scaling, const int32_t* axes,
                            ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    std::vector<double> inv_freq;
    for (int64_t i = 0; i < count; ++i) {
      inv_freq.push_back(static_cast<double>(static_cast<int64_t>(turns[i])) * static_cast<double>(kTwoPi) * 0x1p-64);
    }
    ROPEWALK_TRY(FrequenciesFromArray(inv_freq.data(), count, attention_scaling, axes, out));
    std::copy_n(turns, count, (*out)->turns.begin());
    return {};
  });
}

Status FrequenciesFromConfig(std::string_view json, std::string_view name, std::string_view layer_type,
                             int64_t sequence_length, ropewalk_frequencies** out) {
  return WithoutThrowing([&]() -> Status {
    RopeConfig config;
    ROPEWALK_TRY(ReadRopeConfig(json, name, layer_type, sequence_length, /*any_layer_type=*/false, &config));
    return FromRule(config.rule, out);
  });
}

std::string DeviceCopyOf(const ropewalk_frequencies& frequencies) {
  std::string bytes(reinterpret_cast<const char*>(frequencies.turns.data()), AxesOffset(frequencies));
  return bytes.append(reinterpret_cast<const char*>(frequencies.axes.data()),
                      frequencies.axes.size() * sizeof(int32_t));
}

Status FillTable(const ropewalk_frequencies& frequencies, DLTensor* cos, DLTensor* sin) {
  return WithoutThrowing([&]() -> Status {
    const int64_t pairs = frequencies.rotary_dim / 2;
    TableType cos_type{}, sin_type{};
    ROPEWALK_TRY(CheckTable(cos, "cos", pairs, &cos_type));
    ROPEWALK_TRY(CheckTable(sin, "sin", pairs, &sin_type));
    if (cos->shape[0] != sin->shape[0]) {
      return Status::Invalid("table: sin has " + std::to_string(sin->shape[0]) + " rows, but cos has " +
                             std::to_string(cos->shape[0]));
    }
    if (cos->shape[0] > 0 && Overlap(FootprintOf(*cos), FootprintOf(*sin))) {
      return Status::Invalid("table: sin must not share memory with cos, which it overlaps: both are written");
    }
    const bool in_double = frequencies.table_inv_freq.empty();
    const float scaling = F(frequencies.attention_scaling);
    for (int64_t row = 0; row < cos->shape[0]; ++row) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const auto at = static_cast<size_t>(pair);
        const double angle = in_double ? static_cast<double>(row) * frequencies.inv_freq[at]
                                       : D(F(D(F(static_cast<double>(row))) * D(frequencies.table_inv_freq[at])));
        Store(*cos, cos_type, row, pair, TableEntry(std::cos(angle), scaling));
        Store(*sin, sin_type, row, pair, TableEntry(std::sin(angle), scaling));
      }
    }
    return {};
  });
}

}  // namespace ropewalk
