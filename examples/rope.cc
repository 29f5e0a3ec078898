// Rotates q and k of seven tokens on the CPU. README shows it; tests/consumer builds and runs it.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <ropewalk/ropewalk.hpp>
#include <vector>

int main() {
  std::vector<float> q(7 * 32 * 128, 1.0f), k(7 * 8 * 128, 1.0f);  // [tokens, heads, head_dim]
  ropewalk::View q_view(q.data(), ropewalk::kFloat32, {7, 32, 128});
  ropewalk::View k_view(k.data(), ropewalk::kFloat32, {7, 8, 128});
  auto frequencies = ropewalk::Frequencies::Make(/*theta=*/1e6, /*rotary_dim=*/128);
  auto result = ropewalk::rope({.q = &q_view, .k = &k_view, .frequencies = frequencies.get()});
  if (!result) return std::puts(result.text.c_str()), 1;
  std::printf("token 1: %.4f .. %.4f\n", q[32 * 128], q[33 * 128 - 1]);  // token 1: -0.3012 .. 1.0000
}
