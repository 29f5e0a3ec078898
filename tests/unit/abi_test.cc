// The C ABI over time: shorter structs of older callers, longer ones from the future; and the C++ face on top of it.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <ropewalk/ropewalk.h>
#include <ropewalk/ropewalk.hpp>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "rope/call.h"

namespace ropewalk {
namespace {

// Appending is the only change allowed to the struct: these never move.
static_assert(offsetof(ropewalk_rope_args, struct_size) == 0);
static_assert(offsetof(ropewalk_rope_args, pairing) == 4);
#if UINTPTR_MAX == UINT64_MAX
static_assert(offsetof(ropewalk_rope_args, q) == 8);
static_assert(offsetof(ropewalk_rope_args, frequencies) == 40);
static_assert(offsetof(ropewalk_rope_args, rotary_dim) == 80);
static_assert(offsetof(ropewalk_rope_args, q_weight) == 96);
static_assert(offsetof(ropewalk_rope_args, eps) == 120);
static_assert(offsetof(ropewalk_rope_args, q_out) == 128);
static_assert(offsetof(ropewalk_rope_args, v_scale) == 184);
static_assert(offsetof(ropewalk_rope_args, sycl_queue) == 192);
static_assert(offsetof(ropewalk_rope_args, disable_pdl) == 200);
static_assert(offsetof(ropewalk_rope_args, k_store_only) == 208);
static_assert(sizeof(ropewalk_rope_args) == 216);
#endif

struct Tensor {
  std::vector<float> data;
  int64_t shape[3];
  DLTensor tensor;
  Tensor(int64_t tokens, int64_t heads, int64_t dim)
      : data(static_cast<size_t>(tokens * heads * dim)), shape{tokens, heads, dim}, tensor{data.data(),
                                                                                           {kDLCPU, 0},
                                                                                           3,
                                                                                           {kDLFloat, 32, 1},
                                                                                           shape,
                                                                                           nullptr,
                                                                                           0} {
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i % 13) - 6.0f;
  }
};

// A caller's struct of `size` bytes and not one more.
std::unique_ptr<char[]> ShortStruct(size_t size, Tensor* q, const Frequencies& frequencies) {
  auto bytes = std::make_unique<char[]>(size);
  ropewalk_rope_args full;
  full.struct_size = static_cast<uint32_t>(size);
  full.q = &q->tensor;
  full.frequencies = frequencies.get();
  std::memcpy(bytes.get(), &full, size);
  return bytes;
}

TEST(Abi, ShorterStructsHaveTheDefaults) {
  const Frequencies frequencies = Frequencies::Make(10000.0, 8);
  Tensor want(3, 2, 8);
  ASSERT_TRUE(rope({.q = &want.tensor, .frequencies = frequencies.get()}));
  for (size_t size = offsetof(ropewalk_rope_args, cos); size <= sizeof(ropewalk_rope_args); size += 8) {
    Tensor q(3, 2, 8);
    const auto bytes = ShortStruct(size, &q, frequencies);
    ASSERT_EQ(ropewalk_rope(reinterpret_cast<const ropewalk_rope_args*>(bytes.get()), nullptr), ROPEWALK_OK)
        << size << ": " << ropewalk_last_error();
    EXPECT_EQ(q.data, want.data) << size;
  }
}

TEST(Abi, AStructWithoutEpsHasTheDefaultEps) {
  const Frequencies frequencies = Frequencies::Make(10000.0, 8);
  Tensor q(1, 1, 8), want(1, 1, 8);
  for (size_t i = 0; i < 8; ++i) q.data[i] = want.data[i] = 1e-3f;  // so small that eps tells
  ASSERT_TRUE(rope({.q = &want.tensor, .frequencies = frequencies.get(), .norm = ROPEWALK_NORM_RMS}));
  const size_t size = offsetof(ropewalk_rope_args, eps);
  const auto bytes = ShortStruct(size, &q, frequencies);
  const int32_t norm = ROPEWALK_NORM_RMS;
  std::memcpy(bytes.get() + offsetof(ropewalk_rope_args, norm), &norm, sizeof(norm));
  ASSERT_EQ(ropewalk_rope(reinterpret_cast<const ropewalk_rope_args*>(bytes.get()), nullptr), ROPEWALK_OK);
  EXPECT_EQ(q.data, want.data);
}

// A struct cut before the angles lacks them: refused by name, not read past its end.
TEST(Abi, StructsCutBeforeWhatIsNeeded) {
  const Frequencies frequencies = Frequencies::Make(10000.0, 8);
  Tensor q(3, 2, 8);
  for (size_t size = offsetof(ropewalk_rope_args, k); size < offsetof(ropewalk_rope_args, cos); size += 8) {
    const auto bytes = ShortStruct(size, &q, frequencies);
    EXPECT_EQ(ropewalk_rope(reinterpret_cast<const ropewalk_rope_args*>(bytes.get()), nullptr),
              ROPEWALK_INVALID_ARGUMENT);
    EXPECT_NE(std::string(ropewalk_last_error()).find("frequencies are missing"), std::string::npos);
  }
}

TEST(Abi, OtherSizesAreRefused) {
  const Frequencies frequencies = Frequencies::Make(10000.0, 8);
  Tensor q(3, 2, 8);
  const std::vector<float> before = q.data;
  for (const uint32_t size :
       {0u, 1u, 8u, 15u, static_cast<uint32_t>(sizeof(ropewalk_rope_args)) + 1, 4096u, UINT32_MAX}) {
    ropewalk_rope_args args;
    args.struct_size = size;
    args.q = &q.tensor;
    args.frequencies = frequencies.get();
    EXPECT_EQ(ropewalk_rope(&args, nullptr), ROPEWALK_INVALID_ARGUMENT) << size;
    const std::string text = ropewalk_last_error();
    EXPECT_NE(text.find("struct_size"), std::string::npos) << text;
    EXPECT_NE(text.find(std::to_string(size)), std::string::npos) << text;
    EXPECT_NE(text.find(std::to_string(sizeof(ropewalk_rope_args))), std::string::npos) << text;
    EXPECT_EQ(ropewalk_explain(&args), nullptr);
    EXPECT_EQ(ropewalk_prepare(&args), ROPEWALK_INVALID_ARGUMENT);
  }
  EXPECT_EQ(q.data, before);
}

TEST(Abi, VersionAgreesWithTheHeader) {
  EXPECT_EQ(std::string(ropewalk_version()), std::to_string(ROPEWALK_VERSION_MAJOR) + "." +
                                                 std::to_string(ROPEWALK_VERSION_MINOR) + "." +
                                                 std::to_string(ROPEWALK_VERSION_PATCH));
}

TEST(Abi, DescriptionNamesEveryFieldOnce) {
  const nlohmann::json json = nlohmann::json::parse(ropewalk_description());
  EXPECT_EQ(json.at("op"), "rope");
  const std::string schema = ropewalk_torch_schema();
  ASSERT_EQ(json.at("args").size(), RopeDescription().size());
  std::vector<char> covered(sizeof(ropewalk_rope_args));
  for (const Arg& arg : RopeDescription()) {
    EXPECT_NE(schema.find(std::string(" ") + arg.name), std::string::npos) << arg.name;
    const bool pointer = arg.kind == Kind::kTensor || arg.kind == Kind::kHandle || arg.kind == Kind::kQueue;
    const size_t size = pointer ? sizeof(void*) : arg.kind == Kind::kDouble ? sizeof(double) : sizeof(int32_t);
    for (size_t i = arg.offset; i < arg.offset + size; ++i) EXPECT_EQ(covered[i]++, 0) << arg.name;
  }
  for (const size_t reserved : {offsetof(ropewalk_rope_args, reserved), offsetof(ropewalk_rope_args, reserved_2)}) {
    for (size_t i = reserved; i < reserved + sizeof(int32_t); ++i) EXPECT_EQ(covered[i]++, 0) << "byte " << i;
  }
  for (size_t i = sizeof(uint32_t); i < covered.size(); ++i) EXPECT_EQ(covered[i], 1) << "byte " << i;
}

TEST(Cpp, ServesAndRefuses) {
  const Frequencies frequencies = Frequencies::Make(10000.0, 8);
  ASSERT_TRUE(frequencies) << frequencies.result().text;
  EXPECT_EQ(frequencies.rotary_dim(), 8);
  EXPECT_EQ(frequencies.attention_scaling(), 1.0);
  EXPECT_NEAR(frequencies.inv_freq()[1], 0.1, 1e-15);
  Tensor q(2, 1, 8);
  EXPECT_TRUE(rope({.q = &q.tensor, .frequencies = frequencies.get(), .inverse = 1}));
  EXPECT_TRUE(prepare({.q = &q.tensor, .frequencies = frequencies.get()}));
  EXPECT_TRUE(explain({.q = &q.tensor, .frequencies = frequencies.get()}).has_value());
  EXPECT_TRUE(check_faults());
  const Result refused = rope({.q = &q.tensor});
  EXPECT_FALSE(refused);
  EXPECT_EQ(refused.code, ROPEWALK_INVALID_ARGUMENT);
  EXPECT_NE(refused.text.find("frequencies"), std::string::npos) << refused.text;
  EXPECT_FALSE(explain({.q = &q.tensor}).has_value());
}

TEST(Cpp, ViewsDescribeMemory) {
  float data[24];
  const View contiguous(data, kFloat32, {2, 3, 4});
  EXPECT_EQ(contiguous.ndim, 3);
  EXPECT_EQ(contiguous.data, data);
  EXPECT_EQ(std::vector<int64_t>(contiguous.shape, contiguous.shape + 3), (std::vector<int64_t>{2, 3, 4}));
  EXPECT_EQ(std::vector<int64_t>(contiguous.strides, contiguous.strides + 3), (std::vector<int64_t>{12, 4, 1}));
  View copy(nullptr, kBfloat16, {1}, {7}, {kDLCUDA, 3});
  EXPECT_EQ(copy.device.device_id, 3);
  EXPECT_EQ(copy.strides[0], 7);
  copy = View(contiguous);  // whose sizes are its own
  EXPECT_NE(copy.shape, contiguous.shape);
  EXPECT_EQ(copy.shape[2], 4);
  EXPECT_THROW(View(data, kFloat32, {2, 3}, {3}), std::invalid_argument);
  EXPECT_THROW(View(data, kFloat32, {1, 1, 1, 1, 1, 1, 1, 1, 1}), std::invalid_argument);
}

TEST(Cpp, AFailureIsToldWhereFrequenciesAreUsed) {
  const auto failed = Frequencies::Make(0.5, 8);
  EXPECT_FALSE(failed);
  Tensor q(2, 1, 8);
  const std::function<void()> uses[] = {[&] { (void)rope({.q = &q.tensor, .frequencies = failed.get()}); },
                                        [&] { (void)failed.rotary_dim(); }, [&] { (void)failed.attention_scaling(); },
                                        [&] { (void)failed.inv_freq(); }, [&] { (void)failed.warnings(); }};
  for (const auto& use : uses) {
    try {
      use();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(std::string(error.what()).find("theta must be greater than 1"), 0u) << error.what();
    }
  }
}

TEST(Abi, NoFrequenciesHaveNothing) {
  EXPECT_EQ(ropewalk_frequencies_rotary_dim(nullptr), 0);
  EXPECT_EQ(ropewalk_frequencies_attention_scaling(nullptr), 1.0);
  EXPECT_EQ(ropewalk_frequencies_inv_freq(nullptr), nullptr);
  EXPECT_EQ(ropewalk_frequencies_axes(nullptr), nullptr);
  EXPECT_STREQ(ropewalk_frequencies_warnings(nullptr), "");
  ropewalk_frequencies_retain(nullptr);
  ropewalk_frequencies_release(nullptr);
  EXPECT_EQ(ropewalk_frequencies_table(nullptr, nullptr, nullptr), ROPEWALK_INVALID_ARGUMENT);
}

TEST(Cpp, FrequenciesAreShared) {
  Frequencies empty;
  EXPECT_FALSE(empty);
  Frequencies first = Frequencies::Make(10000.0, 8);
  Frequencies second = first;
  EXPECT_EQ(first.get(), second.get());
  Frequencies third = std::move(first);
  EXPECT_EQ(third.get(), second.get());
  second = third;
  third = Frequencies::Make(10000.0, 16);
  EXPECT_EQ(second.rotary_dim(), 8);
  EXPECT_EQ(third.rotary_dim(), 16);
  const double inv_freq[] = {1.0, 0.5};
  const int32_t axes[] = {0, 1};
  const Frequencies given = Frequencies::FromArray(inv_freq, 2, 1.5, axes);
  ASSERT_TRUE(given) << given.result().text;
  EXPECT_EQ(given.attention_scaling(), 1.5);
  EXPECT_EQ(ropewalk_frequencies_axes(given.get())[1], 1);
  EXPECT_EQ(ropewalk_frequencies_axes(second.get()), nullptr);
}

TEST(Cpp, FailedFrequenciesSayWhy) {
  for (const Frequencies& failed :
       {Frequencies::Make(-1.0, 8), Frequencies::Make(10000.0, 7), Frequencies::Make(10000.0, 8, "{"),
        Frequencies::FromArray(nullptr, 3), Frequencies::FromConfig("[]", "some/config.json")}) {
    EXPECT_FALSE(failed);
    EXPECT_FALSE(failed.result());
    EXPECT_FALSE(failed.result().text.empty());
  }
  EXPECT_EQ(ropewalk_frequencies_create(10000.0, 8, nullptr, 0, nullptr), ROPEWALK_INVALID_ARGUMENT);
  ropewalk_frequencies_retain(nullptr);
  ropewalk_frequencies_release(nullptr);
}

}  // namespace
}  // namespace ropewalk
