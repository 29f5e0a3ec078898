// A user of the C++ face: interleaved pairs of one head, out and back again; a table, by a function of compat.hpp;
// and refusals.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/compat.hpp>
#include <ropewalk/ropewalk.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>

int main() {
  int failed = 0;
  const auto check = [&](bool held, const char* what, const std::string& text) {
    if (!held) std::fprintf(stderr, "consumer.cc: %s: %s\n", what, text.c_str());
    failed += !held;
  };

  std::array<float, 4> data{1, 2, 3, 4};
  std::array<int64_t, 3> shape{1, 1, 4};
  std::array<int64_t, 1> tokens{1};
  int32_t position = -7;
  DLTensor q{.data = data.data(),
             .device = {kDLCPU, 0},
             .ndim = 3,
             .dtype = {kDLFloat, 32, 1},
             .shape = shape.data(),
             .strides = nullptr,
             .byte_offset = 0};
  const DLTensor positions{.data = &position,
                           .device = {kDLCPU, 0},
                           .ndim = 1,
                           .dtype = {kDLInt, 32, 1},
                           .shape = tokens.data(),
                           .strides = nullptr,
                           .byte_offset = 0};

  const auto frequencies = ropewalk::Frequencies::Make(100.0, 4);
  check(static_cast<bool>(frequencies), "frequencies", frequencies.result().text);

  ropewalk::RopeArgs args{
      .pairing = ROPEWALK_INTERLEAVED, .q = &q, .positions = &positions, .frequencies = frequencies.get()};
  auto result = ropewalk::rope(args);
  check(static_cast<bool>(result), "rope", result.text);
  for (size_t i = 0; i < 2; ++i) {
    const double angle = -7.0 * std::pow(100.0, -static_cast<double>(i) / 2), a = 1 + 2.0 * static_cast<double>(i),
                 b = a + 1;
    check(std::abs(data[2 * i] - (a * std::cos(angle) - b * std::sin(angle))) < 1e-5, "first of a pair", "");
    check(std::abs(data[2 * i + 1] - (b * std::cos(angle) + a * std::sin(angle))) < 1e-5, "second of a pair", "");
  }

  args.inverse = 1;
  result = ropewalk::rope(args);
  check(static_cast<bool>(result), "inverse", result.text);
  for (size_t i = 0; i < 4; ++i) check(std::abs(data[i] - static_cast<float>(i + 1)) < 1e-5f, "there and back", "");

  std::array<float, 4> quarter_turns{0, 0, 1, 1};  // one row: cosines, then sines
  std::array<int64_t, 2> table_shape{1, 4};
  const DLTensor table{.data = quarter_turns.data(),
                       .device = {kDLCPU, 0},
                       .ndim = 2,
                       .dtype = {kDLFloat, 32, 1},
                       .shape = table_shape.data(),
                       .strides = nullptr,
                       .byte_offset = 0};
  position = 0;
  result = ropewalk::compat::rotary_embedding(&positions, &q, nullptr, 4, &table, false);
  check(static_cast<bool>(result), "rotary_embedding", result.text);
  const std::array<float, 4> turned{-2, 1, -4, 3};
  for (size_t i = 0; i < 4; ++i) check(std::abs(data[i] - turned[i]) < 1e-5f, "a quarter of a turn", "");
  check(!ropewalk::compat::rotary_embedding(&positions, &q, nullptr, 8, &table, false), "another head size is refused",
        "");

  check(!ropewalk::Frequencies::Make(100.0, 3), "an odd rotary_dim is refused", "");
  std::printf("consumer.cc: %d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
