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

#include "base/status.h"
#include "base/tensor.h"

namespace ropewalk {

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
  kWorkspace,
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

// Checks every argument of a call against the description and collects the sizes. `mapped_axes`: pairs have a map to
// axes. `strides` gets one entry an argument.
Status Check(std::span<const Arg> args_table, const void* args, bool mapped_axes, Sizes* sizes,
             std::span<Strides> strides);

// An input that is read alone where its output is given; both may be the same tensor.
struct Replaced {
  const char* in;
  const char* out;
};
// Memory that is written must be one tensor's alone, each element once. Inputs of `only_read` are not written.
Status CheckOverlap(std::span<const Arg> args_table, const void* args, std::span<const Replaced> replaced,
                    std::span<const char* const> only_read = {});

std::string DescriptionJson(std::span<const Arg> args_table);
std::string TorchSchema(std::span<const Arg> args_table);
std::string ShapeSpec(const Arg& arg);  // "[batch?, tokens, q_heads, head_dim]"

}  // namespace ropewalk
