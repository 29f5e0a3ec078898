// SPDX-License-Identifier: Apache-2.0
#include "base/tensor.h"

#include <cmath>

#include "base/text.h"

namespace ropewalk {
namespace {

// DLPack's codes for 8-bit floats, newer than the oldest dlpack.h that we build with.
constexpr uint8_t kDlFloat8E4M3Fn = 10;
constexpr uint8_t kDlFloat8E5M2 = 12;

struct DtypeEntry {
  uint32_t dtype;
  const char* name;
  uint8_t code, bits;
};
constexpr DtypeEntry kDtypes[] = {
    {kF32, "float32", kDLFloat, 32},
    {kF16, "float16", kDLFloat, 16},
    {kBF16, "bfloat16", kDLBfloat, 16},
    {kE4M3, "float8_e4m3fn", kDlFloat8E4M3Fn, 8},
    {kE5M2, "float8_e5m2", kDlFloat8E5M2, 8},
    {kI32, "int32", kDLInt, 32},
    {kI64, "int64", kDLInt, 64},
};

}  // namespace

uint32_t DtypeOf(DLDataType type) {
  for (const DtypeEntry& entry : kDtypes) {
    if (entry.code == type.code && entry.bits == type.bits) return entry.dtype;
  }
  return 0;
}

std::string DtypeName(DLDataType type) {
  std::string name;
  for (const DtypeEntry& entry : kDtypes) {
    if (entry.code == type.code && entry.bits == type.bits) name = entry.name;
  }
  if (name.empty()) {
    constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    name = Text(type.code < 7 ? kCodes[type.code] : "dtype of an unknown kind, bits ", static_cast<int>(type.bits));
  }
  return type.lanes == 1 ? name : Text(name, "x", type.lanes);
}

std::string DtypeNames(uint32_t dtypes) {
  std::string out;
  for (const DtypeEntry& entry : kDtypes) {
    if (!(dtypes & entry.dtype)) continue;
    dtypes &= ~entry.dtype;
    if (!out.empty()) out += dtypes ? ", " : " or ";
    out += entry.name;
  }
  return out;
}

int64_t DtypeBytes(uint32_t dtype) {
  for (const DtypeEntry& entry : kDtypes) {
    if (entry.dtype == dtype) return entry.bits / 8;
  }
  return 0;
}

std::string DeviceName(DLDevice device) {
  switch (DeviceType(device)) {
    case kDLCPU: return "cpu";
    case kDLCUDA: return Text("cuda:", device.device_id);
    case kDLCUDAHost: return "pinned host memory";
    case kDLOpenCL: return Text("opencl:", device.device_id);
    case kDlOneApi: return Text("xpu:", device.device_id);
    default: return Text("device type ", DeviceType(device), ":", device.device_id);
  }
}

std::string ShapeText(const DLTensor& tensor) {
  if (tensor.ndim < 0 || tensor.ndim > kMostDims || (tensor.ndim > 0 && !tensor.shape)) return "";
  std::string out = "[";
  for (int i = 0; i < tensor.ndim; ++i) Append(&out, Text(i ? ", " : "", tensor.shape[i]));
  return out + "]";
}

bool SpansTooMuch(const DLTensor& tensor) {
  constexpr double kMostBytes = 4.6e18;
  double count = tensor.dtype.bits / 8.0, span = 0.0;
  bool empty = false;  // strides between no elements span nothing
  for (int i = 0; i < tensor.ndim; ++i) {
    empty |= tensor.shape[i] == 0;
    count *= static_cast<double>(tensor.shape[i] ? tensor.shape[i] : 1);
    if (tensor.strides) {
      span += std::abs(static_cast<double>(tensor.strides[i])) * static_cast<double>(tensor.shape[i]) *
              (tensor.dtype.bits / 8.0);
    }
  }
  return count > kMostBytes || (!empty && span > kMostBytes);
}

}  // namespace ropewalk
