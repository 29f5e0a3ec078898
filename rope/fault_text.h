// The records of faults that a device keeps, and the message of a fault.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string>

#include "base/text.h"
#include "rope/fault.h"
#include "rope/params.h"

namespace ropewalk {

// The kernel does not know whether a call is batched or has offsets, but the message says so. Hence four records: the
// index of a call's record is 1 if it is batched, plus 2 if it has offsets.
inline constexpr size_t kRopeFaultRecords = 4;

inline std::array<rope_fault, kRopeFaultRecords> NoRopeFaults() {
  std::array<rope_fault, kRopeFaultRecords> none{};
  for (rope_fault& fault : none) fault.key = ~rw_u64{0};
  return none;
}

inline std::string RopeFaultText(const rope_fault& fault, bool batched, bool offsets) {
  const auto row = static_cast<int64_t>(fault.key >> 2);
  const int64_t tokens = std::max<int64_t>(fault.tokens, 1);
  const std::string where = batched ? Text("[", row / tokens, ", ", row % tokens, "]") : Text("[", row, "]");
  switch (static_cast<int>(fault.key & 3)) {
    case kRopeFaultPosition:
      return Text("rope: positions", where, " is ", fault.value, fault.axis ? Text(" on axis ", fault.axis) : "",
                  offsets ? " with its offset" : "", ", but the table has ", fault.limit,
                  " rows; the token was filled with NaN");
    case kRopeFaultSlot:
      return Text("rope: slots", where, " is ", fault.value, ", but the cache has ", fault.limit,
                  " slots; the token was not stored");
    default:
      return Text("rope: axes[", fault.axis, "] is ", fault.value, ", but positions have ", fault.limit,
                  " rows; all tokens were filled with NaN");
  }
}

// Of the first bad token; "" if there is none.
inline std::string RopeFaultText(std::span<const rope_fault, kRopeFaultRecords> faults) {
  const auto first = std::ranges::min_element(faults, {}, &rope_fault::key);
  const auto record = static_cast<unsigned>(first - faults.begin());
  return first->key == ~rw_u64{0} ? "" : RopeFaultText(*first, record & 1u, record & 2u);
}

}  // namespace ropewalk
