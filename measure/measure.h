// Timing on a noisy machine: ours and the floor take turns (A B B A). "Of floor" is our time over the
// floor's, the median of pairs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace ropewalk::bench {

template <class Function>
double SecondsOf(Function&& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

inline bool Noisy(std::vector<double> figures) {
  std::ranges::sort(figures);
  return !figures.empty() && figures[figures.size() * 3 / 4] > 1.25 * figures[figures.size() / 4];
}

struct Paired {
  double ours = 0, floor = 0;  // median seconds of one call
  double of_floor = 0;         // median of ours / floor, pair by pair: 1 is the floor's speed
  int pairs = 0;
  int64_t calls = 0;   // in each of a pair's halves
  bool noisy = false;  // the middle half of ours / floor lies further apart than by a quarter
};

// Times `ours` and `floor` in turns for about `seconds`. `restore` puts the data back, untimed, before values drift
// (a norm applied again and again would end in denormals); `max_calls` is how many calls may come before it.
template <class Ours, class FloorCall, class RestoreCall>
Paired MeasurePaired(Ours&& ours, FloorCall&& floor, RestoreCall&& restore, double seconds, int64_t max_calls = 64) {
  constexpr double kBatch = 100e-6;  // long against the clock's own cost
  constexpr int kMinPairs = 9, kMaxPairs = 400;
  restore();
  ours();
  floor();
  const double once = std::max({SecondsOf(ours), SecondsOf(floor), 1e-9});
  Paired out;
  out.calls = std::clamp<int64_t>(static_cast<int64_t>(kBatch / once), 1, max_calls);
  const auto batch = [&](auto&& call) {
    return SecondsOf([&] {
             for (int64_t i = 0; i < out.calls; ++i) call();
           }) /
           static_cast<double>(out.calls);
  };
  std::vector<double> ours_seconds, floor_seconds, figures;
  int64_t since_restore = 2;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  while (out.pairs < kMinPairs || (out.pairs < kMaxPairs && elapsed() < seconds)) {
    if (since_restore + out.calls > max_calls) {
      restore();
      // The copy has moved the caches: one of each before the next pair.
      ours();
      floor();
      since_restore = 1;
    }
    double a, b;
    if (out.pairs % 2) {
      a = batch(ours);
      b = batch(floor);
    } else {
      b = batch(floor);
      a = batch(ours);
    }
    since_restore += out.calls;
    ours_seconds.push_back(a);
    floor_seconds.push_back(b);
    figures.push_back(a / b);
    ++out.pairs;
  }
  out.ours = Median(ours_seconds);
  out.floor = Median(floor_seconds);
  out.of_floor = Median(figures);
  out.noisy = Noisy(figures);
  return out;
}

// What a call costs on the host beside the run-time's own launch of the same kernel with the same arguments.
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
