// The maths of frequencies: every scaling rule in double-double, the fixed-point turns, and the frequencies of Hugging
// Face's table. The rules are those of transformers' modeling_rope_utils.py; what they compute in float32 is exact
// here.
// SPDX-License-Identifier: Apache-2.0
#include "frequencies/frequencies.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "base/text.h"
#include "frequencies/double_double.h"
#include "frequencies/torch_pow.h"

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

}  // namespace

Status FrequenciesFromRule(const RopeRule& rule, ropewalk_frequencies** out) {
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

std::string DeviceCopyOf(const ropewalk_frequencies& frequencies) {
  std::string bytes(reinterpret_cast<const char*>(frequencies.turns.data()), AxesOffset(frequencies));
  return bytes.append(reinterpret_cast<const char*>(frequencies.axes.data()),
                      frequencies.axes.size() * sizeof(int32_t));
}

}  // namespace ropewalk
