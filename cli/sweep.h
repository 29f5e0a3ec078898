// ropewalk bench --sweep: what head sizes and rotated parts of every kind cost on the CPU beside 128 of 128.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/common.h"
#include "measure/place.h"

namespace ropewalk::cli {

struct SweepOptions {
  std::vector<std::string> dtypes, pairings, ops;
  int64_t tokens = 0;  // 0: 64, or 32 in float32
  double seconds = 0;  // of timing for each line
  std::string json, csv;
};

// Returns an ExitCode.
int Sweep(const SweepOptions& options);

// What the other lines of bench are written with.
Json MachineOf(const bench::Place& place);
std::string Csv(const Json& results);

}  // namespace ropewalk::cli
