// Hugging Face's table: cos and sin of every position, bit for bit but where torch's own cosine errs.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <string>

#include "base/overlap.h"
#include "base/tensor.h"
#include "frequencies/frequencies.h"
#include "frequencies/torch_pow.h"

namespace ropewalk {
namespace {

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

struct Table {
  uint32_t dtype = 0;
  char* data = nullptr;
  int64_t row = 0, pair = 0;  // strides, in bytes
};

Status ReadTable(const DLTensor* tensor, const char* name, int64_t pairs, Table* table) {
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
  table->dtype = tensor->dtype.lanes == 1 ? DtypeOf(tensor->dtype) : 0;
  if (!(table->dtype & kFloats)) return Status::Invalid(prefix + " must be " + DtypeNames(kFloats));
  if (SpansTooMuch(*tensor)) {
    return Status::Invalid(prefix + " must span less than 2^62 bytes, but its shape is " + ShapeText(*tensor) +
                           (tensor->strides != nullptr ? " with larger strides" : ""));
  }
  if (tensor->shape[0] == 0) return {};
  if (tensor->data == nullptr) return Status::Invalid(prefix + " has no data");
  if (FootprintOf(*tensor).repeats()) {
    return Status::Invalid(prefix + " is written, but some of its elements share memory (overlapping strides)");
  }
  const int64_t bytes = DtypeBytes(table->dtype);
  table->data = static_cast<char*>(DataOf(*tensor));
  table->row = StrideOf(*tensor, 0) * bytes;
  table->pair = StrideOf(*tensor, 1) * bytes;
  return {};
}

void Store(const Table& table, int64_t row, int64_t pair, float value) {
  char* const at = table.data + row * table.row + pair * table.pair;
  if (table.dtype == kF32) {
    std::memcpy(at, &value, 4);
  } else {
    const uint16_t half = table.dtype == kF16 ? ToFloat16(value) : ToBfloat16(value);
    std::memcpy(at, &half, 2);
  }
}

}  // namespace

Status FillTable(const ropewalk_frequencies& frequencies, DLTensor* cos, DLTensor* sin) {
  return WithoutThrowing([&]() -> Status {
    const int64_t pairs = frequencies.rotary_dim / 2;
    Table cosines, sines;
    ROPEWALK_TRY(ReadTable(cos, "cos", pairs, &cosines));
    ROPEWALK_TRY(ReadTable(sin, "sin", pairs, &sines));
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
        Store(cosines, row, pair, TableEntry(std::cos(angle), scaling));
        Store(sines, row, pair, TableEntry(std::sin(angle), scaling));
      }
    }
    return {};
  });
}

}  // namespace ropewalk
