// The description of an operation's arguments, and what reads it: checks, JSON, torch schema. The description is the
// one place where an argument's name, dtypes and shape are written; checks, messages, bindings, docs and the negative
// tests are loops over it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string>

#include "core/status.h"

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

// Names of dimensions. A name that two arguments share must have one size in a call.
enum class Dim : uint8_t {
  kNone,
  kAxes,
  kBatch,
  kTokens,
  kQHeads,
  kKHeads,
  kHeadDim,
  kVDim,
  kRows,
  kPairs,
  kRotaryDim,
  kPages,
  kPageSize,
  kCount
};
const char* DimName(Dim dim);

enum class Kind : uint8_t { kTensor, kHandle, kQueue, kInt, kBool, kChoice, kDouble };
enum class Intent : uint8_t { kIn, kOut, kInOut };

enum Flag : uint32_t {
  kRequired = 1u << 0,
  kUnitStride = 1u << 1,     // the last dimension must be contiguous
  kBroadcast = 1u << 2,      // the batch may be absent or of size 1, a last dimension k_heads too
  kHostScalar = 1u << 3,     // one value may lie on the host, whatever q's device
  kOptionalBatch = 1u << 4,  // dims[0] == kBatch is there iff q has 4 dimensions
  kOptionalAxes = 1u << 5,   // dims[0] == kAxes is there iff pairs are mapped to axes
  kOptionalPages = 1u << 6,  // dims[0] == kPages may be absent
};

struct Arg {
  const char* name;
  Kind kind;
  size_t offset;  // in the argument struct
  const char* doc;
  Intent intent = Intent::kIn;
  uint32_t dtypes = 0;
  const char* like = nullptr;  // its dtype must be that of this argument (or one of `dtypes`)
  std::array<Dim, 4> dims = {};
  uint32_t flags = 0;
  std::array<const char*, 8> choices = {};  // kChoice: the names of 0, 1 and so on; null behind the last
  const char* default_text = "None";        // in Python

  constexpr int choice_count() const {
    return static_cast<int>(std::ranges::find(choices, static_cast<const char*>(nullptr)) - choices.begin());
  }
};

// The sizes that a call's tensors agree on; -1 for a name that no tensor has.
struct Sizes {
  std::array<int64_t, static_cast<size_t>(Dim::kCount)> value;
  std::array<const char*, static_cast<size_t>(Dim::kCount)> from;  // the argument that said so
  int64_t operator[](Dim dim) const { return value[static_cast<size_t>(dim)]; }
};

// A tensor's dimensions as the description names them: strides by name, in elements, 0 where absent or of size 1.
struct Strides {
  std::array<int64_t, static_cast<size_t>(Dim::kCount)> value;
  int64_t operator[](Dim dim) const { return value[static_cast<size_t>(dim)]; }
};

inline const DLTensor* TensorOf(const Arg& arg, const void* args) {
  const DLTensor* tensor;
  std::memcpy(&tensor, static_cast<const char*>(args) + arg.offset, sizeof(tensor));
  return tensor;
}
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

// Checks every argument of a call against the description and collects the sizes. `mapped_axes`: pairs have a map to
// axes. `strides` gets one entry an argument.
Status Check(const char* op, std::span<const Arg> args_table, const void* args, bool mapped_axes, Sizes* sizes,
             std::span<Strides> strides);

std::string DescriptionJson(const char* op, std::span<const Arg> args_table);
std::string TorchSchema(const char* op, std::span<const Arg> args_table);
std::string ShapeSpec(const Arg& arg);  // "[batch?, tokens, q_heads, head_dim]"

}  // namespace ropewalk
