// What lists of cases are made with, listed or drawn: numbers that are the same everywhere, what options ask of each
// other, unique names. For the files of conformance/ that make cases, and for tests/plan_space.h, which draws calls.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "conformance/cases.h"

namespace ropewalk {

// Draws numbers that are the same everywhere.
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  template <class T, size_t n>
  T Of(const T (&choices)[n]) {
    return choices[Next() % n];
  }
  int64_t From(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(uint64_t n) { return Next() % n == 0; }

 private:
  uint64_t state_;
};

inline constexpr uint32_t kDtypes[] = {kF32, kF16, kBF16};
inline constexpr int32_t kPairings[] = {ROPEWALK_NEOX, ROPEWALK_INTERLEAVED};
inline constexpr Layout kLayouts[] = {Layout::kSeparate, Layout::kPacked,     Layout::kTransposed,
                                      Layout::kPadded,   Layout::kMisaligned, Layout::kReversed};

// What an option asks of the others. False: the case has no meaning.
bool Settle(RopeCase* c);

// Cases with unique names, each settled.
class CaseList {
 public:
  void Add(RopeCase c) {
    if (!Settle(&c)) return;
    c.name = CaseName(c);
    if (names_.insert(c.name).second) cases_.push_back(std::move(c));
  }
  int64_t size() const { return static_cast<int64_t>(cases_.size()); }
  std::vector<RopeCase> Take() { return std::move(cases_); }

 private:
  std::vector<RopeCase> cases_;
  std::unordered_set<std::string> names_;
};

// One of the whole product of options.
RopeCase DrawnCase(Draw& draw);

}  // namespace ropewalk
