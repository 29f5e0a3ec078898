// The definition of the operation: plain loops in double over the caller's arguments, on host memory. It shares nothing
// with the kernels nor with lower(), and expects arguments that lower() accepts.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ropewalk/ropewalk.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "rope/arguments.h"

namespace ropewalk {

// What must be found in one element of an output.
struct Expected {
  enum class Want : uint8_t {
    kSame,   // the bits that were there before the call
    kBits,   // `bits`: copied from an input
    kNan,    // any NaN
    kRange,  // a number from low to high; `value` is the exact result (fused) or that of the emulated chain (reference)
  };
  Want want = Want::kSame;
  uint32_t bits = 0;
  double value = 0, low = 0, high = 0;
};

enum class RopeOutput : uint8_t { kQ, kK, kKCache, kVCache };
const char* OutputName(const ropewalk_rope_args& args, RopeOutput output);  // "q_out", "k_cache"
DLTensor* OutputTensor(const ropewalk_rope_args& args, RopeOutput output);  // the tensor that is written

// One head of one token in an output. `outer` is the batch, or the page of a cache; `token` also the place in a page.
struct ExpectedRow {
  RopeOutput output;
  int64_t outer, token, head;
  std::span<const Expected> elements;
};
using RowVisitor = std::function<void(const ExpectedRow&)>;

// In elements, from the tensor's first; for tensors [tokens, heads, dim] `outer` is ignored.
int64_t RowOffset(const DLTensor& tensor, int64_t outer, int64_t token, int64_t head);

// The first token that is poisoned or not stored because of a bad argument: batch * tokens + token; -1: none.
struct ReferenceFault {
  int64_t token = -1;
  int32_t kind = 0;  // kRopeFault*
};

// Visits every row that the call may write. Memory outside the visited rows must keep its bytes.
ReferenceFault RopeReference(const ropewalk_rope_args& args, const RowVisitor& visit);
// The same for one token.
ReferenceFault RopeReferenceToken(const ropewalk_rope_args& args, int64_t batch, int64_t token,
                                  const RowVisitor& visit);

// The gradient of a weight: each element, and the sum of the magnitudes of what is added up to it (the length of a pair
// of dY, times |n|), of which errors are fractions.
struct ReferenceWeightGrad {
  std::vector<double> value, magnitude;
};
// The gradient of norm and rotation, for arguments that ropewalk_rope_backward accepts. Visits the rows of q_grad and
// k_grad, or of what is written instead (kQ and kK).
ReferenceFault RopeBackwardReference(const ropewalk_rope_args& args, const ropewalk_rope_gradients& gradients,
                                     const RowVisitor& visit, ReferenceWeightGrad* q_weight,
                                     ReferenceWeightGrad* k_weight);

// Numbers as tensors hold them, by dtype of rope/arguments.h. Rounding is to nearest even; fp8 saturates.
double RoundNumber(uint32_t dtype, double value);
double LoadNumber(uint32_t dtype, const void* at);
void StoreNumber(uint32_t dtype, double value, void* at);
int64_t LoadInteger(uint32_t dtype, const void* at);

}  // namespace ropewalk
