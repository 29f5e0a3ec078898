// The gradient of norm and rotation: against the double-precision reference, between guards, for what a case can say;
// its sums over many rows and on any number of threads; and what it refuses.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <ropewalk/ropewalk.hpp>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backends/cpu/dispatch.h"
#include "base/text.h"
#include "conformance/case_call.h"
#include "conformance/cases.h"
#include "conformance/runner.h"
#include "rope/backward.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

void ExpectAllPass(const std::vector<RopeCase>& cases, const char* what) {
  double worst = 0;
  size_t failed = 0;
  for (const RopeCase& c : cases) {
    const CaseResult result = RunBackwardCase(c, HostMemory());
    worst = std::max(worst, result.worst);
    if (result.passed) continue;
    ADD_FAILURE() << c.name << ": " << result.message;
    if (++failed == 5) return;
  }
  EXPECT_GT(cases.size(), 0u);
  Report(Text(cases.size(), " gradients: ", what, ", the worst ", worst, " of its tolerance"));
}

// Each target of this CPU.
void OnEachTarget(const std::function<void(const std::string&)>& body) {
  for (const CpuTarget& target : CpuTargets()) {
    if (!target.supported()) continue;
    const std::string name = Text("cpu:", target.name);
    ASSERT_TRUE(force_backend(name.c_str()));
    body(name);
  }
  ASSERT_TRUE(force_backend(nullptr));
}

TEST(Backward, CasesOfTheList) {
  OnEachTarget([](const std::string& target) { ExpectAllPass(BackwardCases(7), target.c_str()); });
}

// dY so small that products of it are subnormal before 1 / rms makes them greater: they lost 11 bits.
TEST(Backward, ProductsOfSubnormalNumbers) {
  std::vector<RopeCase> cases = RandomBackwardCases(11, 200);
  std::erase_if(cases, [](const RopeCase& c) { return c.data != Data::kMixed || c.dtype != kF32 || !c.norm; });
  ExpectAllPass(cases, "float32 of mixed sizes");
}

TEST(Backward, RandomCases) { ExpectAllPass(RandomBackwardCases(20261130, 1500), "random ones"); }

// ---------------------------------------------------------------------------------------------------------------------
// Sums

struct Results {
  std::vector<float> dx_q, dx_k, q_weight, k_weight;
  bool operator==(const Results&) const = default;
};

RopeCase LongCase(int64_t tokens) {
  RopeCase c;
  c.dtype = kF32;
  c.tokens = tokens;
  c.q_heads = 2;
  c.k_heads = 1;
  c.head_dim = 8;
  c.norm = true;
  c.weight = Weight::kPlain;
  c.weight_dtype = kF32;
  c.name = Text("long", tokens);
  return c;
}

std::vector<float> Floats(const DLTensor* tensor) {
  if (!tensor) return {};
  size_t count = 1;
  for (int i = 0; i < tensor->ndim; ++i) count *= static_cast<size_t>(tensor->shape[i]);
  std::vector<float> out(count);
  std::memcpy(out.data(), DataOf(*tensor), count * sizeof(float));
  return out;
}

Results RunOf(const RopeCase& c) {
  std::unique_ptr<CaseCall> call;
  EXPECT_TRUE(CaseCall::MakeBackward(c, HostMemory(), &call).ok());
  const Status status = call->Run();
  EXPECT_TRUE(status.ok()) << status.text();
  const ropewalk_rope_gradients& g = call->gradients();
  return {Floats(g.q_grad), Floats(g.k_grad), Floats(g.q_weight_grad), Floats(g.k_weight_grad)};
}

TEST(Backward, SumsOverManyRows) {
  std::vector<RopeCase> cases;
  for (const int64_t tokens : {1, 2, 127, 1000, 50000, 1000000}) cases.push_back(LongCase(tokens));
  ExpectAllPass(cases, "up to a million rows");
}

// All terms of one sign: errors add up, where those of random ones cancel.
TEST(Backward, SumsOfEqualTerms) {
  constexpr int64_t kTokens = 300000, kDim = 8;
  std::vector<float> x(kTokens * kDim), grad(kTokens * kDim), weight(kDim, 1.0f), weight_grad(kDim);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = 0.37f + 0.1f * static_cast<float>(i % kDim);
    grad[i] = 1.1f;
  }
  const Frequencies frequencies = Frequencies::Make(10000.0, kDim);
  const std::vector<int64_t> zeros(kTokens);
  View vx(x.data(), kFloat32, {kTokens, 1, kDim}), vg(grad.data(), kFloat32, {kTokens, 1, kDim});
  View vw(weight.data(), kFloat32, {kDim}), vwg(weight_grad.data(), kFloat32, {kDim});
  View positions(const_cast<int64_t*>(zeros.data()), kInt64, {kTokens});
  const RopeArgs args = {.q = &vx, .positions = &positions, .frequencies = frequencies.get(), .q_weight = &vw};
  RopeGradients gradients = {.q_grad = &vg, .q_weight_grad = &vwg};
  const int64_t needed = rope_backward_workspace(args, gradients);
  ASSERT_GT(needed, 0);
  std::vector<float> room(static_cast<size_t>(needed));
  View workspace(room.data(), kFloat32, {needed});
  gradients.workspace = &workspace;
  ASSERT_TRUE(rope_backward(args, gradients));
  double square = 0;
  for (int i = 0; i < kDim; ++i)
    square += static_cast<double>(x[static_cast<size_t>(i)]) * static_cast<double>(x[static_cast<size_t>(i)]);
  const double rstd = 1 / std::sqrt(square / kDim + 1e-6);
  for (size_t i = 0; i < kDim; ++i) {
    const double want = static_cast<double>(kTokens) * static_cast<double>(x[i]) * rstd * static_cast<double>(1.1f);
    EXPECT_NEAR(static_cast<double>(weight_grad[i]) / want, 1.0, 0x1p-20) << i;
  }
}

TEST(Backward, TheSameBitsOnAnyNumberOfThreads) {
  const RopeCase c = LongCase(20000);
  const Results alone = RunOf(c);
  EXPECT_EQ(alone.q_weight.size(), 8u);
  for (const int32_t threads : {2, 3, 7, 16}) {
    ASSERT_EQ(ropewalk_set_threads(threads), ROPEWALK_OK);
    EXPECT_TRUE(RunOf(c) == alone) << threads << " threads";
  }
  ASSERT_EQ(ropewalk_set_threads(1), ROPEWALK_OK);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is refused

class Refused : public testing::Test {
 protected:
  std::vector<float> data_ = std::vector<float>(4096, 1.0f);
  Frequencies frequencies_ = Frequencies::Make(10000.0, 8);
  View At(size_t place, std::initializer_list<int64_t> shape) {
    return View(data_.data() + 256 * place, kFloat32, shape);
  }
  View q_ = At(0, {3, 2, 8}), k_ = At(1, {3, 1, 8}), q_grad_ = At(2, {3, 2, 8}), k_grad_ = At(3, {3, 1, 8});
  View weight_ = At(4, {8}), q_weight_grad_ = At(5, {8}), k_weight_grad_ = At(6, {8}), other_ = At(7, {3, 2, 8});
  View workspace_ = At(8, {1024});
  RopeArgs args_ = {.q = &q_, .k = &k_, .frequencies = frequencies_.get(), .q_weight = &weight_, .k_weight = &weight_};
  RopeGradients gradients_ = {.q_grad = &q_grad_,
                              .k_grad = &k_grad_,
                              .q_weight_grad = &q_weight_grad_,
                              .k_weight_grad = &k_weight_grad_,
                              .workspace = &workspace_};

  void Expect(const std::string& text) {
    const std::vector<float> before = data_;
    const Result result = rope_backward(args_, gradients_);
    EXPECT_EQ(result.code, ROPEWALK_INVALID_ARGUMENT) << text;
    EXPECT_EQ(result.text, "rope: " + text);
    EXPECT_EQ(data_, before);
  }
};

TEST_F(Refused, Nothing) { EXPECT_TRUE(rope_backward(args_, gradients_)); }
TEST_F(Refused, NoGradient) {
  gradients_.q_grad = nullptr;
  Expect("q_grad is missing: [batch?, tokens, q_heads, head_dim] is required");
}
TEST_F(Refused, NoInputOfANorm) {
  args_.q = nullptr;
  Expect("q is missing: the gradient of the norm needs it as it was before");
}
TEST_F(Refused, AnInputWithoutItsGradient) {
  gradients_.k_grad = nullptr;
  Expect("k is given, but k_grad is missing");
}
TEST_F(Refused, AnotherSize) {
  q_ = At(0, {4, 2, 8});
  Expect("q has 4 tokens, but q_grad has 3");
}
TEST_F(Refused, AnotherDtype) {
  q_.dtype = kBfloat16;
  Expect("q must be float32, but is bfloat16");
}
TEST_F(Refused, AnotherDtypeOfASum) {
  q_weight_grad_.dtype = kBfloat16;
  Expect("q_weight_grad must be float32, but is bfloat16");
}
TEST_F(Refused, AnotherDevice) {
  q_weight_grad_.device = {kDLCUDA, 0};
  Expect("q_weight_grad must be on the device of q_grad (cpu), but is on cuda:0");
}
TEST_F(Refused, ASumOfNoWeight) {
  args_.q_weight = args_.k_weight = nullptr;
  args_.norm = ROPEWALK_NORM_RMS;
  Expect("q_weight_grad is given, but q_weight is missing");
}
TEST_F(Refused, AStore) {
  args_.q_out = &other_;
  Expect("q_out is given, but the gradient is of the norm and the rotation alone: leave it out");
  args_.q_out = nullptr;
  args_.k_store_only = 1;
  Expect("k_store_only is 1, but the gradient is of the norm and the rotation alone");
}
TEST_F(Refused, MemoryThatIsSharedWithWhatIsWritten) {
  gradients_.q_grad_out = &q_;
  Expect("q must not share memory with q_grad_out, which it overlaps: q_grad_out is written");
  gradients_.q_grad_out = &q_grad_;  // in place
  EXPECT_TRUE(rope_backward(args_, gradients_));
  gradients_.q_grad_out = nullptr;
  gradients_.q_weight_grad = &k_weight_grad_;
  Expect("k_weight_grad must not share memory with q_weight_grad, which it overlaps: q_weight_grad is written");
}
TEST_F(Refused, AWorkspaceThatIsTooSmall) {
  const int64_t needed = rope_backward_workspace(args_, gradients_);
  EXPECT_EQ(needed, 32);  // one chunk: for both, 8 sums and what they lack of doubles
  workspace_ = At(8, {needed - 1});
  Expect("workspace must have at least 32 elements, but has 31");
  gradients_.workspace = nullptr;
  Expect("workspace is missing: the gradient of the weights needs one of 32 elements");
  gradients_.q_weight_grad = gradients_.k_weight_grad = nullptr;
  EXPECT_EQ(rope_backward_workspace(args_, gradients_), 0);
  EXPECT_TRUE(rope_backward(args_, gradients_));
}
TEST_F(Refused, StructsOfOtherSizes) {
  gradients_.struct_size = 12;
  Expect(Text("struct_size must be sizeof(ropewalk_rope_gradients) (", sizeof(RopeGradients), "), but is 12"));
  gradients_.struct_size = 4096;
  Expect(Text("struct_size must be at most ", sizeof(RopeGradients), " for Ropewalk ", ropewalk_version(),
              ", but is 4096: the caller was built for a newer one"));
  EXPECT_EQ(ropewalk_rope_backward(&args_, nullptr, nullptr), ROPEWALK_INVALID_ARGUMENT);
  EXPECT_STREQ(ropewalk_last_error(), "rope: gradients is null");
  EXPECT_EQ(ropewalk_rope_backward_workspace(nullptr, &gradients_), -1);
}
TEST_F(Refused, NothingForNoTokens) {
  for (View* view : {&q_, &q_grad_}) *view = At(0, {0, 2, 8});
  for (View* view : {&k_, &k_grad_}) *view = At(0, {0, 1, 8});
  EXPECT_EQ(rope_backward_workspace(args_, gradients_), 0);
  const Result result = rope_backward(args_, gradients_);
  EXPECT_TRUE(result) << result.text;
  EXPECT_EQ(data_[5 * 256], 0.0f);  // the sum of nothing
}

// The description is that of the call, and the gradient's own arguments before it.
TEST(BackwardDescription, HasAllArguments) {
  const std::span<const Arg> all = RopeBackwardDescription();
  ASSERT_EQ(all.size(), kRopeGradients + RopeDescription().size());
  for (size_t i = 0; i < RopeDescription().size(); ++i) {
    EXPECT_STREQ(all[kRopeGradients + i].name, RopeDescription()[i].name);
  }
  EXPECT_EQ(sizeof(ropewalk_rope_gradients), 8 + kRopeGradients * sizeof(void*));
}

}  // namespace
}  // namespace ropewalk
