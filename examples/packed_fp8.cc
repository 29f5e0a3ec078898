// A decode step of a layer on the CPU: packed rows of q, k and v, RMSNorm of the heads of q and k, the rotation, and k
// and v into a paged cache of fp8, in one call. tests/consumer builds and runs it.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdio>
#include <ropewalk/ropewalk.hpp>
#include <vector>

using ropewalk::View;

int main() {
  constexpr int64_t kTokens = 3, kQHeads = 8, kKHeads = 2, kDim = 64, kPages = 4, kPageSize = 16;
  constexpr int64_t kRow = (kQHeads + 2 * kKHeads) * kDim;
  std::vector<float> rows(kTokens * kRow, 1.0f), weight(kDim, 1.0f);
  std::vector<uint8_t> k_pages(kPages * kPageSize * kKHeads * kDim), v_pages(k_pages.size());
  const std::vector<int64_t> positions{5, 9, 130}, slots{5, 25, -1};  // -1: padding, which is not stored

  // Views of one row: strides in elements.
  View q(rows.data(), ropewalk::kFloat32, {kTokens, kQHeads, kDim}, {kRow, kDim, 1});
  View k(rows.data() + kQHeads * kDim, ropewalk::kFloat32, {kTokens, kKHeads, kDim}, {kRow, kDim, 1});
  View v(rows.data() + (kQHeads + kKHeads) * kDim, ropewalk::kFloat32, {kTokens, kKHeads, kDim}, {kRow, kDim, 1});
  View k_cache(k_pages.data(), ropewalk::kFloat8E4m3fn, {kPages, kPageSize, kKHeads, kDim});
  View v_cache(v_pages.data(), ropewalk::kFloat8E4m3fn, {kPages, kPageSize, kKHeads, kDim});
  View norm(weight.data(), ropewalk::kFloat32, {kDim});
  View at(const_cast<int64_t*>(positions.data()), ropewalk::kInt64, {kTokens});
  View to(const_cast<int64_t*>(slots.data()), ropewalk::kInt64, {kTokens});

  const auto frequencies = ropewalk::Frequencies::Make(1e6, kDim);
  const auto result = ropewalk::rope({.q = &q,
                                      .k = &k,
                                      .positions = &at,
                                      .frequencies = frequencies.get(),
                                      .norm = ROPEWALK_NORM_RMS,
                                      .q_weight = &norm,
                                      .k_weight = &norm,
                                      .v = &v,
                                      .k_cache = &k_cache,
                                      .v_cache = &v_cache,
                                      .slots = &to});
  if (!result) return std::puts(result.text.c_str()), 1;
  int stored = 0;
  for (const uint8_t value : v_pages) stored += value != 0;
  std::printf("v: %d values in the cache, the first 0x%02x\n", stored, v_pages[5 * kKHeads * kDim]);  // 256, 0x38: 1.0
}
