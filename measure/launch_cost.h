// What a call costs on the host beside the run-time's own launch of the same kernel with the same arguments.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "measure/measure.h"

namespace ropewalk::bench {

struct LaunchCost {
  double own, ours;  // nanoseconds of a call
  bool held() const { return ours - own <= 2000; }
};

// Medians of many batches of 40 calls, so that the queue never fills. `wait()`, for the queue, is left out of the
// times; where it fails they are infinite.
template <class Own, class Ours, class Wait>
LaunchCost MeasureLaunch(const Own& own, const Ours& ours, const Wait& wait) {
  constexpr int kBatches = 400, kCalls = 40;
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const auto nanoseconds = [&](const auto& launch) {
    std::vector<double> times;
    for (int i = 0; i < kBatches; ++i) {
      times.push_back(1e9 / kCalls * SecondsOf([&] {
                        for (int j = 0; j < kCalls; ++j) launch();
                      }));
      if (!wait().ok()) return kNever;
    }
    return Median(std::move(times));
  };
  LaunchCost best = {kNever, kNever};
  for (int round = 0; round < 5; ++round) {  // the best of alternating rounds: the machine has other work
    best.own = std::min(best.own, nanoseconds(own));
    best.ours = std::min(best.ours, nanoseconds(ours));
  }
  return best;
}

}  // namespace ropewalk::bench
