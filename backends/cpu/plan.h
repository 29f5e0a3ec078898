// How the rows of a call are shared among threads on the CPU: the plan, what makes parts of it, and its check. For
// backends/cpu.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "rope/backward.h"
#include "rope/call.h"

namespace ropewalk {

struct RopeCpuPlan {
  int64_t rows = 0;       // batch x tokens; 0: no work
  int64_t grain = 1;      // the fewest rows that are worth a thread
  bool one_part = false;  // too few rows for two threads
};

RopeCpuPlan PlanRopeCpu(const RopeCall& call);

// The gradient: chunks of rows, each of which adds up its part of the weights' gradients by itself. How many there are
// does not depend on threads, so that a sum is the same to the bit on any number of them. A chunk's sums are, of q and
// of k where they are wanted, head_dim floats and as many more with what those lack of doubles.
struct RopeCpuBackwardPlan {
  static constexpr int64_t kMostChunks = 128;
  int64_t chunk_rows = 0, chunks = 0;
  int64_t chunk_sums = 0;  // floats of a chunk; 0: no weight's gradient is wanted, and rows go to threads as in a call
};
RopeCpuBackwardPlan PlanRopeCpuBackward(const RopeBackwardCall& call);

struct RowRange {
  int64_t begin, end;
};

// How many parts the pool makes for a number of threads, and the i-th part. They multiply no rows by parts: that could
// overflow.
inline int64_t RowParts(int64_t rows, int64_t grain, int64_t threads) {
  return std::clamp<int64_t>(rows / std::max<int64_t>(grain, 1), 1, std::max<int64_t>(threads, 1));
}
inline RowRange RowPart(RowRange rows, int64_t i, int64_t parts) {
  const int64_t each = (rows.end - rows.begin) / parts, more = (rows.end - rows.begin) % parts;
  const int64_t begin = rows.begin + i * each + std::min(i, more);
  return {begin, begin + each + (i < more)};
}

// "" if each row is in one part and each part worth its thread. Else a sentence.
std::string RopeCpuPlanFault(const RopeCall& call, const RopeCpuPlan& plan, int threads);

}  // namespace ropewalk
