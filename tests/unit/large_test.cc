// Offsets beyond 2^31 elements. Most tensors here are sparse: their memory is reserved, and only the pages of a few
// tokens are met. The dense one runs where memory allows.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "conformance/reference.h"

namespace ropewalk {
namespace {

// Zeros that take no memory until written.
class Reserved {
 public:
  explicit Reserved(size_t bytes) : bytes_(bytes) {
    memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reserved() {
    if (ok()) munmap(memory_, bytes_);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  bool ok() const { return memory_ != MAP_FAILED; }
  uint16_t* bf16() const { return static_cast<uint16_t*>(memory_); }
  float* f32() const { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

constexpr DLDataType kTypeBF16 = {kDLBfloat, 16, 1};
constexpr DLDataType kTypeF32 = {kDLFloat, 32, 1};
constexpr DLDataType kTypeI64 = {kDLInt, 64, 1};

struct LargeTensor {
  int64_t shape[4], strides[4];
  DLTensor tensor;
  LargeTensor(void* data, DLDataType type, std::vector<int64_t> sizes, std::vector<int64_t> steps) {
    std::copy(sizes.begin(), sizes.end(), shape);
    std::copy(steps.begin(), steps.end(), strides);
    tensor = {data, {kDLCPU, 0}, static_cast<int32_t>(sizes.size()), type, shape, strides, 0};
  }
};

void FillRow(uint16_t* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) StoreNumber(kBF16, std::sin(static_cast<double>(i) * 1.7) * 3, row + i);
}

// Each head of the token, as the reference wants it: `want` was computed from the numbers before the call.
struct Wanted {
  RopeOutput output;
  int64_t outer, token, head;
  std::vector<Expected> elements;
};

std::vector<Wanted> WantedOf(const ropewalk_rope_args& args, int64_t token) {
  std::vector<Wanted> wanted;
  RopeReferenceToken(args, 0, token, [&](const ExpectedRow& row) {
    wanted.push_back({row.output, row.outer, row.token, row.head, {row.elements.begin(), row.elements.end()}});
  });
  return wanted;
}

void ExpectWanted(const ropewalk_rope_args& args, const std::vector<Wanted>& wanted) {
  EXPECT_FALSE(wanted.empty());
  for (const Wanted& row : wanted) {
    const DLTensor& tensor = *OutputTensor(args, row.output);
    const auto* data = static_cast<const uint16_t*>(tensor.data) + RowOffset(tensor, row.outer, row.token, row.head);
    for (size_t i = 0; i < row.elements.size(); ++i) {
      const Expected& want = row.elements[i];
      if (want.want == Expected::Want::kSame) continue;
      if (want.want == Expected::Want::kBits) {
        ASSERT_EQ(data[i], want.bits) << OutputName(args, row.output) << " token " << row.token << ", " << i;
        continue;
      }
      const double got = LoadNumber(kBF16, data + i);
      ASSERT_GE(got, want.low) << OutputName(args, row.output) << " token " << row.token << ", " << i;
      ASSERT_LE(got, want.high) << OutputName(args, row.output) << " token " << row.token << ", " << i;
    }
  }
}

class Large : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(ropewalk_frequencies_create(10000.0, 128, nullptr, 0, &frequencies_), ROPEWALK_OK);
  }
  void TearDown() override { ropewalk_frequencies_release(frequencies_); }
  ropewalk_frequencies* frequencies_ = nullptr;
};

TEST_F(Large, TokensFarApart) {
  constexpr int64_t kStride = (int64_t{1} << 31) + 4096;  // elements; five tokens span 16 GB
  const Reserved memory(static_cast<size_t>(kStride) * 2 * 4 + 4096);
  if (!memory.ok()) GTEST_SKIP() << "no address space for 16 GB";
  for (int64_t token = 0; token < 5; ++token) FillRow(memory.bf16() + token * kStride, 256);
  LargeTensor q(memory.bf16(), kTypeBF16, {5, 2, 128}, {kStride, 128, 1});
  const ropewalk_rope_args args = {.q = &q.tensor, .frequencies = frequencies_, .norm = ROPEWALK_NORM_RMS};
  std::vector<std::vector<Wanted>> wanted;
  for (int64_t token = 0; token < 5; ++token) wanted.push_back(WantedOf(args, token));
  ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  for (const auto& rows : wanted) ExpectWanted(args, rows);
}

TEST_F(Large, HeadsFarApart) {
  constexpr int64_t kStride = (int64_t{1} << 30) + 128;
  const Reserved memory(static_cast<size_t>(kStride) * 2 * 4);
  if (!memory.ok()) GTEST_SKIP() << "no address space for 8 GB";
  for (int64_t head = 0; head < 4; ++head) FillRow(memory.bf16() + head * kStride, 256);
  LargeTensor q(memory.bf16(), kTypeBF16, {2, 4, 128}, {128, kStride, 1});
  const ropewalk_rope_args args = {.q = &q.tensor, .frequencies = frequencies_};
  const auto first = WantedOf(args, 0), second = WantedOf(args, 1);
  ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  ExpectWanted(args, first);
  ExpectWanted(args, second);
}

TEST_F(Large, SlotsFarApart) {
  constexpr int64_t kSlots = (int64_t{1} << 25) + 8;  // of 128 elements: 2^32 and more
  const Reserved k_cache(static_cast<size_t>(kSlots) * 128 * 2), v_cache(static_cast<size_t>(kSlots) * 128 * 2);
  if (!k_cache.ok() || !v_cache.ok()) GTEST_SKIP() << "no address space for 2 x 8 GB";
  std::vector<uint16_t> q_data(3 * 128), k_data(3 * 128), v_data(3 * 128);
  for (auto* data : {&q_data, &k_data, &v_data}) FillRow(data->data(), 3 * 128);
  std::vector<int64_t> slot_data = {kSlots - 1, (int64_t{1} << 24) + 1, 7};
  const std::vector<int64_t> shape = {3, 1, 128}, strides = {128, 128, 1};
  LargeTensor q(q_data.data(), kTypeBF16, shape, strides), k(k_data.data(), kTypeBF16, shape, strides),
      v(v_data.data(), kTypeBF16, shape, strides), slots(slot_data.data(), kTypeI64, {3}, {1}),
      keys(k_cache.bf16(), kTypeBF16, {kSlots / 8, 8, 1, 128}, {8 * 128, 128, 128, 1}),
      values(v_cache.bf16(), kTypeBF16, {kSlots / 8, 8, 1, 128}, {8 * 128, 128, 128, 1});
  const ropewalk_rope_args args = {.q = &q.tensor,
                                   .k = &k.tensor,
                                   .frequencies = frequencies_,
                                   .v = &v.tensor,
                                   .k_cache = &keys.tensor,
                                   .v_cache = &values.tensor,
                                   .slots = &slots.tensor};
  std::vector<std::vector<Wanted>> wanted;
  for (int64_t token = 0; token < 3; ++token) wanted.push_back(WantedOf(args, token));
  ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  for (const auto& rows : wanted) {
    EXPECT_EQ(rows.size(), 4u);
    ExpectWanted(args, rows);
  }
}

TEST_F(Large, RowsOfATableFarApart) {
  constexpr int64_t kRows = (int64_t{1} << 26) + 3;  // of 64 elements
  const Reserved cos(static_cast<size_t>(kRows) * 64 * 4), sin(static_cast<size_t>(kRows) * 64 * 4);
  if (!cos.ok() || !sin.ok()) GTEST_SKIP() << "no address space for 2 x 16 GB";
  std::vector<int64_t> position_data = {kRows - 1, (int64_t{1} << 25) + 1, 0};
  for (const int64_t row : position_data) {
    for (int64_t i = 0; i < 64; ++i) {
      cos.f32()[row * 64 + i] = static_cast<float>(std::cos(static_cast<double>(row % 1000 + i)));
      sin.f32()[row * 64 + i] = static_cast<float>(std::sin(static_cast<double>(row % 1000 + i)));
    }
  }
  std::vector<uint16_t> q_data(3 * 128);
  FillRow(q_data.data(), 3 * 128);
  LargeTensor q(q_data.data(), kTypeBF16, {3, 1, 128}, {128, 128, 1}),
      positions(position_data.data(), kTypeI64, {3}, {1}), table_cos(cos.f32(), kTypeF32, {kRows, 64}, {64, 1}),
      table_sin(sin.f32(), kTypeF32, {kRows, 64}, {64, 1});
  const ropewalk_rope_args args = {
      .q = &q.tensor, .positions = &positions.tensor, .cos = &table_cos.tensor, .sin = &table_sin.tensor};
  std::vector<std::vector<Wanted>> wanted;
  for (int64_t token = 0; token < 3; ++token) wanted.push_back(WantedOf(args, token));
  ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  for (const auto& rows : wanted) ExpectWanted(args, rows);
}

int64_t AvailableGigabytes() {
  std::ifstream stream("/proc/meminfo");
  std::string key;
  while (stream >> key) {
    if (key != "MemAvailable:") continue;
    int64_t kilobytes = 0;
    stream >> kilobytes;
    return kilobytes >> 20;
  }
  return 0;
}

TEST_F(Large, MoreThan2To31Elements) {
  if (AvailableGigabytes() < 10) GTEST_SKIP() << "needs 10 GB of free memory";
  constexpr int64_t kTokens = (int64_t{1} << 31) / (8 * 128) + 3;
  const Reserved memory(static_cast<size_t>(kTokens) * 8 * 128 * 2);
  if (!memory.ok()) GTEST_SKIP() << "no address space for 4 GB";
  const int64_t probes[] = {0, 1, kTokens / 2 - 1, kTokens / 2, kTokens / 2 + 1, kTokens - 4, kTokens - 1};
  for (const int64_t token : probes) FillRow(memory.bf16() + token * 8 * 128, 8 * 128);
  LargeTensor q(memory.bf16(), kTypeBF16, {kTokens, 8, 128}, {8 * 128, 128, 1});
  const ropewalk_rope_args args = {.q = &q.tensor, .frequencies = frequencies_};
  std::vector<std::vector<Wanted>> wanted;
  for (const int64_t token : probes) wanted.push_back(WantedOf(args, token));
  ASSERT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_OK) << ropewalk_last_error();
  for (const auto& rows : wanted) ExpectWanted(args, rows);
  // Zeros stay zeros next to them (of either sign).
  for (const int64_t token : {int64_t{2}, kTokens / 2 + 2, kTokens - 2}) {
    for (int64_t i = 0; i < 8 * 128; ++i) ASSERT_EQ(memory.bf16()[token * 8 * 128 + i] & 0x7FFF, 0) << token;
  }
}

}  // namespace
}  // namespace ropewalk
