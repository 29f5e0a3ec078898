// SPDX-License-Identifier: Apache-2.0
#include "rope/arguments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/overlap.h"
#include "base/text.h"

namespace ropewalk {
namespace {

struct DimEntry {
  const char* name;
  const char* counted;  // "5 tokens"; null: "head_dim 128"
};
constexpr DimEntry kDims[] = {
    {"", nullptr},          {"axes", "axes"},          {"batch", nullptr},      {"tokens", "tokens"},
    {"q_heads", "heads"},   {"k_heads", "k_heads"},    {"head_dim", nullptr},   {"v_dim", nullptr},
    {"rows", "rows"},       {"rotary_dim/2", nullptr}, {"rotary_dim", nullptr}, {"pages", "pages"},
    {"page_size", nullptr}, {"workspace", nullptr},
};

std::string SizeText(Dim dim, int64_t size) {
  const DimEntry& entry = kDims[static_cast<size_t>(dim)];
  return entry.counted ? Text(size, " ", entry.counted) : Text(entry.name, " ", size);
}

template <class T>
T Field(const void* args, const Arg& arg) {
  T value;
  std::memcpy(&value, static_cast<const char*>(args) + arg.offset, sizeof(T));
  return value;
}

bool SameDevice(const DLDevice& a, const DLDevice& b) {
  return DeviceType(a) == DeviceType(b) && a.device_id == b.device_id;
}

int64_t Numel(const DLTensor& tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
  return count;
}

const Arg* Find(std::span<const Arg> table, const char* name) {
  const auto it = std::ranges::find_if(table, [&](const Arg& arg) { return std::strcmp(arg.name, name) == 0; });
  return it == table.end() ? nullptr : &*it;
}

struct Checker {
  std::span<const Arg> table;
  const void* args;
  bool mapped_axes;
  const DLTensor* first = nullptr;  // q: says the device, and by its rank whether there is a batch
  const char* first_name = "";
  Sizes* sizes;

  template <class... Parts>
  Status Invalid(const Arg& arg, const Parts&... parts) const {
    return Status::Invalid(Text("rope: ", arg.name, " ", parts...));
  }

  Status CheckScalar(const Arg& arg) const {
    if (arg.kind == Kind::kDouble) {
      const double value = Field<double>(args, arg);
      if (!(value >= 0.0) || std::isinf(value)) return Invalid(arg, "must be a finite number >= 0, but is ", value);
      // Kernels take it as a float32, in which others would be infinite, or nothing.
      constexpr float kLeast = std::numeric_limits<float>::min(), kMost = std::numeric_limits<float>::max();
      if (value != 0.0 && (value < kLeast || value > kMost)) {
        return Invalid(arg, "must be 0 or from ", kLeast, " to ", kMost, ", but is ", value);
      }
      return {};
    }
    const int32_t value = Field<int32_t>(args, arg);
    switch (arg.kind) {
      case Kind::kBool:
        if (value != 0 && value != 1) return Invalid(arg, "must be 0 or 1, but is ", value);
        break;
      case Kind::kChoice:
        if (value < 0 || value >= arg.choice_count()) {
          std::string names;
          for (int i = 0; i < arg.choice_count(); ++i) {
            const char* const joint = i == 0 ? "" : i + 1 < arg.choice_count() ? ", " : " or ";
            Append(&names, Text(joint, arg.choices[static_cast<size_t>(i)], " (", i, ")"));
          }
          return Invalid(arg, "must be ", names, ", but is ", value);
        }
        break;
      default:
        if (value < 0) return Invalid(arg, "must be >= 0, but is ", value);
    }
    return {};
  }

  Status CheckDtype(const Arg& arg, const DLTensor& tensor) const {
    const uint32_t dtype = tensor.dtype.lanes == 1 ? DtypeOf(tensor.dtype) : 0;
    uint32_t accepted = arg.dtypes;
    if (arg.like) {
      // An fp8 cache may differ from `like`, which is why `dtypes` can add to it.
      const DLTensor* like = TensorOf(*Find(table, arg.like), args);
      if (like) accepted = DtypeOf(like->dtype) | (arg.dtypes & kFp8);
    }
    if (dtype & accepted) return {};
    const bool bytes = (accepted & kFp8) && tensor.dtype.code == kDLUInt && tensor.dtype.bits == 8;
    return Invalid(arg, "must be ", DtypeNames(accepted), ", but is ", DtypeName(tensor.dtype),
                   bytes ? ": give a view of the same bytes as one of these" : "");
  }

  Status WrongRank(const Arg& arg, const DLTensor& tensor) const {
    const std::string shape = ShapeText(tensor);
    return Invalid(arg, "must be ", ShapeSpec(arg), first->ndim == 4 ? " with the batch of " : "",
                   first->ndim == 4 ? first_name : "", ", but has ", tensor.ndim,
                   tensor.ndim == 1 ? " dimension" : " dimensions", shape.empty() ? "" : " ", shape);
  }

  Status BindSize(const Arg& arg, Dim dim, int64_t size) const {
    const auto i = static_cast<size_t>(dim);
    if (sizes->value[i] < 0) {
      sizes->value[i] = size;
      sizes->from[i] = arg.name;
    } else if (sizes->value[i] != size) {
      return Invalid(arg, "has ", SizeText(dim, size), ", but ", sizes->from[i], " has ", sizes->value[i]);
    }
    return {};
  }

  Status CheckExtent(const Arg& arg, const DLTensor& tensor) const {
    for (int i = 0; i < tensor.ndim; ++i) {
      if (tensor.shape[i] < 0) return Invalid(arg, "has a negative size: ", ShapeText(tensor));
    }
    if (SpansTooMuch(tensor)) {
      return Invalid(arg, "must span less than 2^62 bytes, but its shape is ", ShapeText(tensor),
                     tensor.strides ? " with larger strides" : "");
    }
    return {};
  }

  // Whether the caller seems to have passed [batch, heads, tokens, head_dim]: k and v then agree with q in the third
  // dimension, where we read heads, and the second dimension of q, where we read tokens, is a multiple of theirs.
  bool IsTransposed(const Arg& arg, const DLTensor& tensor, int64_t tokens) const {
    if (first->ndim != 4) return false;
    if (tensor.ndim < 4) return tokens == first->shape[2];
    return std::ranges::find(arg.dims, Dim::kKHeads) != arg.dims.end() && tensor.shape[2] == first->shape[2] &&
           tokens > 0 && tokens < first->shape[1] && first->shape[1] % tokens == 0;
  }
  Status WithLayout(const Status& status) const {
    return Status::Invalid(Text(status.text(), "; ", first_name,
                                " is read as [batch, tokens, heads, head_dim]: if it is [batch, heads, ",
                                "tokens, head_dim], give transposed views, which serve without a copy"));
  }

  // Names the tensor's dimensions: which of arg.dims is its dimension i.
  Status CheckShape(const Arg& arg, const DLTensor& tensor, Strides* strides) const {
    Dim names[4] = {};
    int count = 0;
    for (const Dim dim : arg.dims) {
      if (dim == Dim::kNone) continue;
      if (dim == Dim::kBatch && (arg.flags & kOptionalBatch) && first->ndim != 4) continue;
      if (dim == Dim::kAxes && (arg.flags & kOptionalAxes) && !mapped_axes) continue;
      names[count++] = dim;
    }
    const auto drop_first = [&] {
      for (int i = 1; i < count; ++i) names[i - 1] = names[i];
      --count;
    };
    if (tensor.ndim < count && (arg.flags & kOptionalPages)) drop_first();
    // Positions without axes serve all axes; then, without a batch, all of the batch.
    if (tensor.ndim < count && names[0] == Dim::kAxes) drop_first();
    if (tensor.ndim < count && (arg.flags & kBroadcast)) {
      if (names[0] == Dim::kBatch || names[0] == Dim::kKHeads) drop_first();
    }
    if (tensor.ndim != count) return WrongRank(arg, tensor);

    // Strides between no elements may be anything: no address is worked out from them.
    const bool empty = Numel(tensor) == 0;
    for (int i = 0; i < count; ++i) {
      const int64_t size = tensor.shape[i];
      const bool broadcasts = (arg.flags & kBroadcast) && (names[i] == Dim::kBatch || names[i] == Dim::kKHeads ||
                                                           (names[i] == Dim::kTokens && arg.dims[0] != Dim::kAxes));
      if (!(broadcasts && size == 1)) {
        Status status = BindSize(arg, names[i], size);
        if (!status.ok())
          return names[i] == Dim::kTokens && IsTransposed(arg, tensor, size) ? WithLayout(status) : status;
      }
      strides->value[static_cast<size_t>(names[i])] = size <= 1 || empty ? 0 : StrideOf(tensor, i);
    }
    if ((arg.flags & kUnitStride) && !empty && tensor.ndim > 0 && tensor.shape[tensor.ndim - 1] > 1 &&
        StrideOf(tensor, tensor.ndim - 1) != 1) {
      return Invalid(arg, "must be contiguous in its last dimension, but its stride there is ",
                     StrideOf(tensor, tensor.ndim - 1));
    }
    return {};
  }

  // What is asked of a tensor before any of its sizes is read.
  Status CheckHasShape(const Arg& arg, const DLTensor& tensor) const {
    if (tensor.ndim < 0 || (tensor.ndim > 0 && !tensor.shape)) return Invalid(arg, "has no shape");
    return tensor.ndim > kMostDims ? WrongRank(arg, tensor) : Status();
  }

  Status CheckTensor(const Arg& arg, const DLTensor& tensor, Strides* strides) const {
    ROPEWALK_TRY(CheckHasShape(arg, tensor));
    ROPEWALK_TRY(CheckDtype(arg, tensor));
    ROPEWALK_TRY(CheckExtent(arg, tensor));
    const bool host_scalar = (arg.flags & kHostScalar) && DeviceType(tensor.device) == kDLCPU;
    if (!SameDevice(tensor.device, first->device) && !(host_scalar && Numel(tensor) == 1)) {
      return Invalid(arg, "must be on the device of ", first_name, " (", DeviceName(first->device), "), but is on ",
                     DeviceName(tensor.device));
    }
    ROPEWALK_TRY(CheckShape(arg, tensor, strides));
    if (Numel(tensor) > 0) {
      if (!tensor.data) return Invalid(arg, "has no data, but its shape is ", ShapeText(tensor));
      const auto address = reinterpret_cast<uintptr_t>(DataOf(tensor));
      const auto bytes = static_cast<uintptr_t>(tensor.dtype.bits / 8);
      if (address % bytes != 0) {
        return Invalid(arg, "must be aligned to its ", bytes, "-byte elements, but its address ends in ",
                       address % bytes);
      }
    }
    return {};
  }
};

}  // namespace

const char* DimName(Dim dim) { return kDims[static_cast<size_t>(dim)].name; }

Status Check(std::span<const Arg> args_table, const void* args, bool mapped_axes, Sizes* sizes,
             std::span<Strides> strides) {
  sizes->value.fill(-1);
  sizes->from.fill(nullptr);
  Checker checker{args_table, args, mapped_axes, nullptr, "", sizes};
  for (size_t i = 0; i < args_table.size(); ++i) {
    const Arg& arg = args_table[i];
    if (arg.kind == Kind::kHandle || arg.kind == Kind::kQueue) continue;
    if (arg.kind != Kind::kTensor) {
      ROPEWALK_TRY(checker.CheckScalar(arg));
      continue;
    }
    const DLTensor* tensor = TensorOf(arg, args);
    if (!tensor) {
      if (arg.flags & kRequired) return checker.Invalid(arg, "is missing: ", ShapeSpec(arg), " is required");
      continue;
    }
    if (!checker.first) {
      checker.first = tensor;
      checker.first_name = arg.name;
      ROPEWALK_TRY(checker.CheckHasShape(arg, *tensor));
      if (tensor->ndim != 3 && tensor->ndim != 4) return checker.WrongRank(arg, *tensor);
    }
    strides[i] = {};
    ROPEWALK_TRY(checker.CheckTensor(arg, *tensor, &strides[i]));
  }
  return {};
}

Status CheckOverlap(std::span<const Arg> args_table, const void* args, std::span<const Replaced> replaced,
                    std::span<const char* const> only_read) {
  struct Part {
    const Arg* arg;
    bool written;
    Footprint footprint;
  };
  constexpr size_t kMostTensors = 32;
  Part parts[kMostTensors];
  size_t count = 0;
  for (const Arg& arg : args_table) {
    const DLTensor* tensor = arg.kind == Kind::kTensor ? TensorOf(arg, args) : nullptr;
    if (!tensor) continue;
    if (count == kMostTensors) return Status::Internal("rope: more tensors than a check of them has room for");
    Part& part = parts[count] = {&arg, arg.intent != Intent::kIn, FootprintOf(*tensor)};
    if (!part.footprint.empty()) ++count;
  }
  const auto find = [&](const char* name) {
    size_t i = 0;
    while (i < count && std::strcmp(parts[i].arg->name, name) != 0) ++i;
    return i;
  };
  for (const Replaced& pair : replaced) {
    const size_t in = find(pair.in);
    if (in == count || !TensorOf(*Find(args_table, pair.out), args)) continue;
    parts[in].written = false;
    const size_t out = find(pair.out);
    if (out < count && SameElements(*TensorOf(*parts[in].arg, args), *TensorOf(*parts[out].arg, args)))
      parts[in] = parts[--count];
  }
  for (const char* name : only_read) {
    if (const size_t i = find(name); i < count) parts[i].written = false;
  }
  for (size_t i = 0; i < count; ++i) {
    if (!parts[i].written) continue;
    if (parts[i].footprint.repeats()) {
      return Status::Invalid(Text("rope: ", parts[i].arg->name,
                                  " is written, but some of its elements share memory (overlapping strides)"));
    }
    for (size_t j = 0; j < count; ++j) {
      if (i == j || (parts[j].written && j < i) || !Overlap(parts[i].footprint, parts[j].footprint)) continue;
      const auto [first, second] = std::minmax(parts[i].arg, parts[j].arg);
      return Status::Invalid(Text("rope: ", second->name, " must not share memory with ", first->name,
                                  ", which it overlaps: ", parts[i].arg->name, " is written"));
    }
  }
  return {};
}

std::string ShapeSpec(const Arg& arg) {
  std::string out = "[";
  for (size_t i = 0; i < arg.dims.size(); ++i) {
    const Dim dim = arg.dims[i];
    if (dim == Dim::kNone) continue;
    if (out.size() > 1) out += ", ";
    out += DimName(dim);
    const bool optional =
        (dim == Dim::kBatch && (arg.flags & kOptionalBatch)) || (dim == Dim::kAxes && (arg.flags & kOptionalAxes)) ||
        (dim == Dim::kPages && (arg.flags & kOptionalPages)) || (dim == Dim::kKHeads && (arg.flags & kBroadcast));
    if (optional) out += '?';
  }
  return out + "]";
}

namespace {

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kTensor: return "tensor";
    case Kind::kHandle: return "handle";
    case Kind::kQueue: return "queue";
    case Kind::kInt: return "int";
    case Kind::kBool: return "bool";
    case Kind::kChoice: return "choice";
    case Kind::kDouble: return "float";
  }
  return "";
}

}  // namespace

// Texts are joined by hand here and in api/: nlohmann::json allocates as it is destroyed, and ends the process if it
// cannot.
std::string DescriptionJson(std::span<const Arg> args_table) {
  std::string out = "{\"op\": \"rope\", \"args\": [";
  for (size_t i = 0; i < args_table.size(); ++i) {
    const Arg& arg = args_table[i];
    Append(&out,
           Text(i ? ", " : "", "{\"name\": ", JsonString(arg.name), ", \"kind\": ", JsonString(KindName(arg.kind)),
                ", \"default\": ", JsonString(arg.default_text), ", \"doc\": ", JsonString(arg.doc)));
    if (arg.kind == Kind::kTensor) {
      const std::string dtypes =
          arg.like ? Text("that of ", arg.like, arg.dtypes & kFp8 ? ", or fp8" : "") : DtypeNames(arg.dtypes);
      Append(&out, Text(", \"intent\": ",
                        JsonString(arg.intent == Intent::kIn    ? "in"
                                   : arg.intent == Intent::kOut ? "out"
                                                                : "inout"),
                        ", \"shape\": ", JsonString(ShapeSpec(arg)), ", \"dtypes\": ", JsonString(dtypes),
                        ", \"unit_stride\": ", arg.flags & kUnitStride ? "true" : "false",
                        ", \"required\": ", arg.flags & kRequired ? "true" : "false",
                        ", \"host_scalar\": ", arg.flags & kHostScalar ? "true" : "false"));
    }
    if (arg.kind == Kind::kChoice) {
      for (int k = 0; k < arg.choice_count(); ++k) {
        Append(&out, Text(k ? ", " : ", \"choices\": [", JsonString(arg.choices[static_cast<size_t>(k)])));
      }
      out += "]";
    }
    out += "}";
  }
  return out + "]}";
}

std::string TorchSchema(std::span<const Arg> args_table) {
  std::string out = "rope_(";
  char alias = 'a';
  for (size_t i = 0; i < args_table.size(); ++i) {
    const Arg& arg = args_table[i];
    if (i) out += ", ";
    switch (arg.kind) {
      case Kind::kTensor: {
        const std::string optional = arg.flags & kRequired ? "" : "?";
        const std::string mark = arg.intent == Intent::kIn ? "" : Text("(", alias++, "!)");
        Append(&out, Text("Tensor", mark, optional, " ", arg.name, optional.empty() ? "" : "=None"));
        break;
      }
      case Kind::kHandle:
      case Kind::kQueue: Append(&out, Text("int ", arg.name, "=0")); break;
      case Kind::kDouble: Append(&out, Text("float ", arg.name, "=", arg.default_text)); break;
      default: Append(&out, Text("int ", arg.name, "=0")); break;
    }
  }
  return out + ") -> ()";
}

}  // namespace ropewalk
