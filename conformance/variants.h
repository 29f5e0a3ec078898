// Variants of kernels that the conformance cases need, whatever the backend: for conformance/cuda_variants.h and
// conformance/spirv_variants.h, and work on many of them at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "conformance/case_call.h"
#include "rope/call.h"

namespace ropewalk {

template <class Key>
struct Variant {
  std::string of;  // a case that needs it
  Key key;
};

// `visit(case, &call)` for each case that is not to be refused; its call may be changed.
template <class Visit>
Status ForEachCall(const std::vector<RopeCase>& cases, const Visit& visit) {
  for (const RopeCase& c : cases) {
    std::unique_ptr<CaseCall> made;
    ROPEWALK_TRY(CaseCall::Make(c, HostMemory(), &made));
    RopeCall call;
    if (LowerRope(made->args(), nullptr, &call).ok()) ROPEWALK_TRY(visit(c, &call));
  }
  return {};
}

// Some that hold every pair of choices that meet in some variant, found one by one. `choices_of(key)`: integers, as
// many for each key.
template <class Key, class ChoicesOf>
std::vector<Variant<Key>> Covering(const std::vector<Variant<Key>>& all, const ChoicesOf& choices_of) {
  std::set<std::tuple<size_t, int, size_t, int>> met;
  std::vector<Variant<Key>> chosen;
  for (const Variant<Key>& variant : all) {
    const std::vector<int> choices = choices_of(variant.key);
    bool is_new = false;
    for (size_t i = 0; i < choices.size(); ++i) {
      for (size_t j = 0; j < i; ++j) is_new |= met.emplace(i, choices[i], j, choices[j]).second;
    }
    if (is_new) chosen.push_back(variant);
  }
  return chosen;
}

// The same, but about a third as many: always the one with the most pairs that no other has yet.
template <class Key, class ChoicesOf>
std::vector<Variant<Key>> FewCovering(const std::vector<Variant<Key>>& all, const ChoicesOf& choices_of) {
  std::map<std::tuple<size_t, int, size_t, int>, size_t> numbers;
  std::vector<std::vector<size_t>> pairs_of;
  for (const Variant<Key>& variant : all) {
    const std::vector<int> choices = choices_of(variant.key);
    std::vector<size_t>& pairs = pairs_of.emplace_back();
    for (size_t i = 0; i < choices.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        pairs.push_back(numbers.try_emplace({i, choices[i], j, choices[j]}, numbers.size()).first->second);
      }
    }
  }
  std::vector<bool> met(numbers.size());
  std::vector<Variant<Key>> chosen;
  for (;;) {
    size_t best = 0;
    long most = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const long count = std::ranges::count_if(pairs_of[i], [&](size_t pair) { return !met[pair]; });
      if (count > most) best = i, most = count;
    }
    if (most == 0) return chosen;
    for (const size_t pair : pairs_of[best]) met[pair] = true;
    chosen.push_back(all[best]);
  }
}

// `work(next)` on as many threads as there are processors; next() gives each number below `count` to one of them, and
// then `count` for ever.
template <class Work>
void OnAllThreads(size_t count, const Work& work) {
  std::atomic<size_t> taken{0};
  const auto next = [&] { return std::min(taken++, count); };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] { work(next); });
  }
  work(next);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace ropewalk
