// Whether two tensors share memory, against every byte: strides of any sign and size, also 0, as expanded tensors have.
// SPDX-License-Identifier: Apache-2.0
#include "base/overlap.h"

#include <gtest/gtest.h>
#include <limits.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace ropewalk {
namespace {

constexpr uintptr_t kBase = 1 << 20;  // where the tensors lie; nothing is read

struct Some {
  DLTensor tensor = {};
  std::array<int64_t, 4> shape, strides;

  Some(std::mt19937* draw, int64_t most_size, int64_t most_stride) {
    const auto from = [&](int64_t low, int64_t high) { return std::uniform_int_distribution(low, high)(*draw); };
    tensor.ndim = static_cast<int32_t>(from(1, 4));
    tensor.dtype = {kDLInt, static_cast<uint8_t>(8 << from(0, 2)), 1};
    tensor.shape = shape.data();
    tensor.strides = strides.data();
    tensor.data = reinterpret_cast<void*>(kBase + static_cast<uintptr_t>(4 * from(0, 40)));
    for (int i = 0; i < tensor.ndim; ++i) {
      const auto at = static_cast<size_t>(i);
      shape[at] = from(0, 19) == 0 ? 0 : from(1, most_size);
      strides[at] = from(0, 3) == 0 ? 0 : from(-most_stride, most_stride);
    }
    if (from(0, 2) != 0) strides[static_cast<size_t>(tensor.ndim - 1)] = 1;
  }
  Some(const Some&) = delete;
  Some& operator=(const Some&) = delete;

  // The address of each byte of each element.
  std::vector<uintptr_t> bytes() const {
    std::vector<uintptr_t> out = {reinterpret_cast<uintptr_t>(tensor.data)};
    const uintptr_t item = tensor.dtype.bits / 8;
    for (int i = 0; i < tensor.ndim; ++i) {
      std::vector<uintptr_t> more;
      for (const uintptr_t at : out) {
        for (int64_t k = 0; k < tensor.shape[i]; ++k)
          more.push_back(at + static_cast<uintptr_t>(k * tensor.strides[i]) * item);
      }
      out = more;
    }
    std::vector<uintptr_t> all;
    for (const uintptr_t at : out) {
      for (uintptr_t k = 0; k < item; ++k) all.push_back(at + k);
    }
    return all;
  }
  std::string text() const {
    std::ostringstream out;
    out << tensor.data << " of " << static_cast<int>(tensor.dtype.bits) << " bits:";
    for (int i = 0; i < tensor.ndim; ++i) out << ' ' << tensor.shape[i] << " by " << tensor.strides[i];
    return out.str();
  }
};

TEST(Overlap, IsExact) {
  std::mt19937 draw(1);
  int shared = 0, apart = 0, expanded = 0;
  for (int round = 0; round < 60000; ++round) {
    const Some a(&draw, 5, 24), b(&draw, 5, 24);
    const std::vector<uintptr_t> of_a = a.bytes(), of_b = b.bytes();
    const std::set<uintptr_t> in_a(of_a.begin(), of_a.end());
    bool meet = false;
    for (const uintptr_t at : of_b) meet |= in_a.count(at) != 0;
    const Footprint left = FootprintOf(a.tensor), right = FootprintOf(b.tensor);
    ASSERT_EQ(left.empty(), of_a.empty());
    if (left.empty() || right.empty()) continue;
    ASSERT_EQ(Overlap(left, right), meet) << a.text() << "; " << b.text();
    ASSERT_EQ(Overlap(right, left), meet) << a.text() << "; " << b.text();
    ASSERT_EQ(left.repeats(), in_a.size() != of_a.size()) << a.text();
    ++(meet ? shared : apart);
    for (int i = 0; i < b.tensor.ndim; ++i) expanded += b.tensor.strides[i] == 0 && b.tensor.shape[i] > 1;
  }
  EXPECT_GT(shared, 10000);
  EXPECT_GT(apart, 5000);
  EXPECT_GT(expanded, 10000);
}

#ifndef ROPEWALK_SANITIZED
// The search goes as deep as the sizes' logarithms: of the largest tensors that pass the checks, on a small stack.
TEST(Overlap, NeedsLittleStack) {
  const auto search = [](void*) -> void* {
    std::mt19937 draw(2);
    for (int round = 0; round < 50; ++round) {
      Some a(&draw, 5, 24), b(&draw, 5, 24);
      for (Some* some : {&a, &b}) {
        some->tensor.ndim = 4;
        some->tensor.dtype = {kDLInt, 8, 1};
        some->tensor.data = reinterpret_cast<void*>(uintptr_t{1} << 40);
        some->shape = {1 << 15, 1 << 15, 1 << 15, 1 << 15};
        for (int64_t& stride : some->strides) stride = std::uniform_int_distribution<int64_t>(0, 1 << 20)(draw);
      }
      (void)Overlap(FootprintOf(a.tensor), FootprintOf(b.tensor));
    }
    return nullptr;
  };
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  const auto least = static_cast<size_t>(PTHREAD_STACK_MIN);  // 128 KB on aarch64
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, std::max<size_t>(48 << 10, least)), 0);
  pthread_t thread;
  ASSERT_EQ(pthread_create(&thread, &attributes, search, nullptr), 0);
  pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
}
#endif

}  // namespace
}  // namespace ropewalk
