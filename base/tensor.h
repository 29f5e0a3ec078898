// What DLPack says of a tensor, and how messages put it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace ropewalk {

inline constexpr int32_t kDlOneApi = 14;  // DLPack's kDLOneAPI: SYCL's unified shared memory; Intel GPUs
// The device's type as a caller wrote it: a newer DLPack's may be no value of the enum that we are built with.
inline int32_t DeviceType(const DLDevice& device) {
  int32_t type;
  static_assert(sizeof(type) == sizeof(device.device_type));
  std::memcpy(&type, &device.device_type, sizeof(type));
  return type;
}

// Bits, so that an argument can accept several.
enum Dtype : uint32_t {
  kF32 = 1u << 0,
  kF16 = 1u << 1,
  kBF16 = 1u << 2,
  kE4M3 = 1u << 3,  // float8_e4m3fn
  kE5M2 = 1u << 4,
  kI32 = 1u << 5,
  kI64 = 1u << 6,
};
inline constexpr uint32_t kFloats = kF32 | kF16 | kBF16;
inline constexpr uint32_t kFp8 = kE4M3 | kE5M2;
inline constexpr uint32_t kInts = kI32 | kI64;

// 0 for a dtype that Ropewalk does not know.
uint32_t DtypeOf(DLDataType type);
std::string DtypeName(DLDataType type);   // "bfloat16", also of foreign ones: "uint8"
std::string DtypeNames(uint32_t dtypes);  // "float32, float16 or bfloat16"
int64_t DtypeBytes(uint32_t dtype);
std::string DeviceName(DLDevice device);        // "cpu", "cuda:0"
std::string ShapeText(const DLTensor& tensor);  // "[4, 8, 64]"; "" if it has none that could be read

// More than any array library has; beyond, `ndim` is no number of dimensions, and sizes are not read.
inline constexpr int32_t kMostDims = 64;

// Also where strides is null.
inline int64_t StrideOf(const DLTensor& tensor, int dim) {
  if (tensor.strides) return tensor.strides[dim];
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i > dim; --i) stride *= tensor.shape[i];
  return stride;
}
// Whether a product of its sizes and strides might overflow: it spans 2^62 bytes or more, in some direction.
bool SpansTooMuch(const DLTensor& tensor);
// data + byte_offset
inline void* DataOf(const DLTensor& tensor) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
}

}  // namespace ropewalk
