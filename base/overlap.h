// Whether two strided tensors share memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

namespace ropewalk {

// The bytes that a tensor's elements occupy: dimensions by falling stride, dense ones merged, sizes of 1 dropped.
struct Footprint {
  struct Axis {
    int64_t stride, size;
  };
  uintptr_t base;
  int64_t item;  // bytes of the innermost dense run; 0: no elements
  int count;
  Axis axes[4];  // `count` of them

  bool empty() const { return item == 0; }
  bool repeats() const;   // some byte is in two of its elements; true too where the search gives up
  uintptr_t end() const;  // one past the last byte
};

Footprint FootprintOf(const DLTensor& tensor);
// Whether each element of the one is the same element of the other: not so a transposed or reversed view of a tensor,
// which has its footprint.
bool SameElements(const DLTensor& a, const DLTensor& b);
// False only if no byte is shared. The search is bounded: tensors so entangled that it gives up count as overlapping.
bool Overlap(const Footprint& a, const Footprint& b);

}  // namespace ropewalk
