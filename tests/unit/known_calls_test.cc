// Calls that are like an earlier one are not checked and lowered again: what serves them instead must be what lowering
// would have made, and whatever lowering would refuse must still be refused.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backends/cuda/plan.h"
#include "base/text.h"
#include "rope/call.h"
#include "rope/known_calls.h"
#include "tests/run_cases.h"

namespace ropewalk {
namespace {

// Arguments whose tensors' descriptions are their own, so that a test may change them.
struct OwnArgs {
  struct Own {
    DLTensor tensor;
    int64_t shape[6], strides[6];
  };
  ropewalk_rope_args args;
  std::map<std::string, std::unique_ptr<Own>> tensors;

  explicit OwnArgs(const ropewalk_rope_args& from) : args(from) {
    for (const Arg& arg : RopeDescription()) {
      const DLTensor* tensor = arg.kind == Kind::kTensor ? TensorOf(arg, &from) : nullptr;
      if (!tensor) continue;
      auto own = std::make_unique<Own>();
      own->tensor = *tensor;
      for (int i = 0; i < tensor->ndim; ++i) {
        own->shape[i] = tensor->shape[i];
        own->strides[i] = StrideOf(*tensor, i);
      }
      own->tensor.shape = own->shape;
      if (tensor->strides) own->tensor.strides = own->strides;
      Set(arg, &own->tensor);
      tensors[arg.name] = std::move(own);
    }
  }
  template <class T>
  void Set(const Arg& arg, T value) {
    std::memcpy(reinterpret_cast<char*>(&args) + arg.offset, &value, sizeof(value));
  }
  template <class T>
  T Get(const Arg& arg) const {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&args) + arg.offset, sizeof(value));
    return value;
  }
};

void Move(DLTensor* tensor, int64_t bytes) { tensor->data = static_cast<char*>(tensor->data) + bytes; }

struct Change {
  std::string name;
  std::function<void(OwnArgs*)> make;
};

// One thing at a time that a later call may have differently.
std::vector<Change> ChangesOf(const OwnArgs& original) {
  std::vector<Change> changes;
  const auto on_tensor = [&](const Arg& arg, std::string what, std::function<void(OwnArgs::Own*)> change) {
    changes.push_back({Text(arg.name, " ", what),
                       [name = std::string(arg.name), change](OwnArgs* o) { change(o->tensors.at(name).get()); }});
  };
  for (const Arg& arg : RopeDescription()) {
    if (arg.kind == Kind::kTensor) {
      const auto it = original.tensors.find(arg.name);
      if (it == original.tensors.end()) continue;
      const DLTensor& tensor = it->second->tensor;
      const bool read = HoldsHostScales(arg, tensor);  // and only where it lies
      if (!read) {
        for (const int64_t bytes : {int64_t{1}, int64_t{2}, int64_t{8}, int64_t{16}, int64_t{32}, int64_t{-64},
                                    int64_t{4096}, int64_t{1} << 40}) {
          on_tensor(arg, Text("moved by ", bytes), [bytes](OwnArgs::Own* own) { Move(&own->tensor, bytes); });
        }
        on_tensor(arg, "without data", [](OwnArgs::Own* own) {
          own->tensor.data = nullptr;
          own->tensor.byte_offset = 0;
        });
      }
      on_tensor(arg, "offset by 32", [](OwnArgs::Own* own) { own->tensor.byte_offset += 32, Move(&own->tensor, -32); });
      on_tensor(arg, "without a shape", [](OwnArgs::Own* own) { own->tensor.shape = nullptr; });
      on_tensor(arg, "without strides", [](OwnArgs::Own* own) { own->tensor.strides = nullptr; });
      on_tensor(arg, "on another device", [](OwnArgs::Own* own) { ++own->tensor.device.device_id; });
      on_tensor(arg, "of another dtype", [](OwnArgs::Own* own) { own->tensor.dtype.code ^= 2; });
      on_tensor(arg, "of wider elements", [](OwnArgs::Own* own) { own->tensor.dtype.bits *= 2; });
      on_tensor(arg, "of vectors", [](OwnArgs::Own* own) { own->tensor.dtype.lanes = 2; });
      for (int i = 0; i < tensor.ndim; ++i) {
        for (const int64_t by : {-1, 1, 2}) {
          if (read) continue;
          on_tensor(arg, Text("dimension ", i, " by ", by), [i, by](OwnArgs::Own* own) { own->shape[i] += by; });
          on_tensor(arg, Text("stride ", i, " by ", by), [i, by](OwnArgs::Own* own) { own->strides[i] += by; });
        }
      }
      if (tensor.ndim > 0) {
        on_tensor(arg, "of lower rank", [](OwnArgs::Own* own) {
          --own->tensor.ndim;
          ++own->tensor.shape;
          if (own->tensor.strides) ++own->tensor.strides;
        });
      }
      changes.push_back({Text("no ", arg.name), [&arg](OwnArgs* o) { o->Set(arg, static_cast<DLTensor*>(nullptr)); }});
      for (const auto& named : original.tensors) {
        const std::string& other = named.first;
        if (other == arg.name || read) continue;
        changes.push_back({Text(arg.name, " where ", other, " is"), [name = std::string(arg.name), other](OwnArgs* o) {
                             const DLTensor& there = o->tensors.at(other)->tensor;
                             DLTensor& moved = o->tensors.at(name)->tensor;
                             moved.data = there.data;
                             moved.byte_offset = there.byte_offset;
                           }});
      }
    } else if (arg.kind == Kind::kHandle || arg.kind == Kind::kQueue) {
      changes.push_back({Text("another ", arg.name), [&arg](OwnArgs* o) {
                           o->Set(arg, o->Get<void*>(arg) ? nullptr : static_cast<void*>(&o->args));
                         }});
    } else if (arg.kind == Kind::kDouble) {
      changes.push_back({Text("another ", arg.name), [&arg](OwnArgs* o) { o->Set(arg, o->Get<double>(arg) + 0.5); }});
    } else {
      for (const int32_t by : {-1, 1, 2}) {
        changes.push_back(
            {Text(arg.name, " by ", by), [&arg, by](OwnArgs* o) { o->Set(arg, o->Get<int32_t>(arg) + by); }});
      }
    }
  }
  const auto scale = original.tensors.find("k_scale");
  if (scale != original.tensors.end() && scale->second->tensor.device.device_type == kDLCPU) {
    for (const float value : {3.75f, 0.0f, NAN}) {
      changes.push_back({Text("k_scale of ", value), [value](OwnArgs* o) {
                           static std::vector<float> others;
                           DLTensor& tensor = o->tensors.at("k_scale")->tensor;
                           others.assign(static_cast<size_t>(tensor.ndim == 0 ? 1 : tensor.shape[0]), 1.0f);
                           if (!others.empty()) others.back() = value;
                           tensor.data = others.data();
                           tensor.strides = nullptr;
                           tensor.byte_offset = 0;
                         }});
    }
  }
  return changes;
}

// "" or what differs.
std::string Difference(const RopeCall& a, const RopeCall& b) {
  if (!(a.variant == b.variant)) return "the variant";
  if (std::memcmp(&a.params, &b.params, sizeof(a.params)) != 0) return "the params";
  if (std::memcmp(&a.tensors, &b.tensors, sizeof(a.tensors)) != 0) return "the addresses";
  if (a.frequencies != b.frequencies) return "the frequencies";
  if (a.device.device_type != b.device.device_type || a.device.device_id != b.device.device_id) return "the device";
  if (a.stream != b.stream || a.sycl_queue != b.sycl_queue || a.disable_pdl != b.disable_pdl) return "the launch";
  return "";
}

std::string PlanDifference(const RopeCall& a, const RopeCall& b) {
  for (const auto layout : {RopeCudaLayout::kFew, RopeCudaLayout::kMany}) {
    RopeCudaPlan plan_a, plan_b;
    const bool ok_a = PlanRopeCuda(a, {132, 9, 0}, {true, layout}, &plan_a).ok();
    const bool ok_b = PlanRopeCuda(b, {132, 9, 0}, {true, layout}, &plan_b).ok();
    if (ok_a != ok_b || !(plan_a.key == plan_b.key) || plan_a.grid_x != plan_b.grid_x ||
        plan_a.grid_y != plan_b.grid_y) {
      return "the plan for CUDA";
    }
  }
  return "";
}

struct Counts {
  int64_t changes = 0, known = 0, moved = 0, moved_known = 0, refused = 0;
};

void CheckCase(const RopeCase& c, Counts* counts) {
  SCOPED_TRACE(c.name);
  std::unique_ptr<CaseCall> made;
  ASSERT_TRUE(CaseCall::Make(c, HostMemory(), &made).ok());
  const OwnArgs original(made->args());
  RopeCall lowered;
  ASSERT_TRUE(LowerRope(original.args, nullptr, &lowered).ok());
  const auto calls = std::make_unique<KnownCalls>();
  ASSERT_EQ(calls->Find(original.args, nullptr), nullptr) << "nothing is known yet";
  const KnownCalls::Known* remembered = calls->Remember(original.args, lowered);
  ASSERT_NE(remembered, nullptr);
  const KnownCalls::Known* again = calls->Find(original.args, nullptr);
  ASSERT_EQ(again, remembered);
  ASSERT_EQ(Difference(again->call, lowered), "");

  // All tensors moved alike, as when a whole workspace is: to where none of those lies that stay, scales on the host.
  constexpr int64_t kFar = int64_t{1} << 40;
  OwnArgs elsewhere(original.args);
  for (const Arg& arg : RopeDescription()) {
    const auto it = elsewhere.tensors.find(arg.name);
    if (it != elsewhere.tensors.end() && !HoldsHostScales(arg, it->second->tensor)) Move(&it->second->tensor, kFar);
  }
  EXPECT_NE(calls->Find(elsewhere.args, nullptr), nullptr) << "a workspace that moved is like the one before";

  for (const Change& change : ChangesOf(original)) {
    OwnArgs changed(original.args);
    change.make(&changed);
    const KnownCalls::Known* known = calls->Find(changed.args, nullptr);
    RopeCall expected;
    const Status status = LowerRope(changed.args, nullptr, &expected);
    ++counts->changes;
    counts->refused += !status.ok();
    const bool far = change.name.ends_with(Text("moved by ", int64_t{1} << 40));
    counts->moved += far;
    if (!known) continue;
    ++counts->known;
    counts->moved_known += far;
    ASSERT_TRUE(status.ok()) << change.name << ": known, but " << status.text();
    ASSERT_EQ(Difference(known->call, expected), "") << change.name;
    ASSERT_EQ(PlanDifference(lowered, expected), "") << change.name;
  }
}

TEST(KnownCalls, WhatIsKnownIsWhatLoweringMakesOfIt) {
  Counts counts;
  for (const RopeCase& c : RopeCases()) {
    CheckCase(c, &counts);
    if (HasFatalFailure()) return;
  }
  RecordProperty("changes", Text(counts.changes));
  std::cout << counts.changes << " changed calls, " << counts.refused << " of them to be refused, " << counts.known
            << " known; of " << counts.moved << " that moved one tensor far away " << counts.moved_known << " known\n";
  EXPECT_GT(counts.refused, counts.changes / 4) << "the changes must try the checks";
  EXPECT_GT(counts.moved_known, counts.moved / 2) << "a call whose tensors lie elsewhere must be known";
}

TEST(KnownCalls, FrequenciesAreKnownByMoreThanTheirAddress) {
  const auto made = MakeCall({});
  RopeCall lowered;
  ASSERT_TRUE(LowerRope(made->args(), nullptr, &lowered).ok());
  const auto calls = std::make_unique<KnownCalls>();
  ASSERT_NE(calls->Remember(made->args(), lowered), nullptr);
  EXPECT_NE(calls->Find(made->args(), nullptr), nullptr);
  auto* const frequencies = const_cast<ropewalk_frequencies*>(made->frequencies());
  frequencies->id += 1'000'000;  // as if freed, and others made in their place
  EXPECT_EQ(calls->Find(made->args(), nullptr), nullptr);
}

TEST(KnownCalls, KeepsTheLastFourAndNoneThatIsInUse) {
  const auto calls = std::make_unique<KnownCalls>();
  std::vector<std::unique_ptr<CaseCall>> made;
  std::vector<RopeCall> lowered(6);
  for (size_t i = 0; i < lowered.size(); ++i) {
    made.push_back(MakeCall({.tokens = static_cast<int64_t>(i) + 1}));
    ASSERT_TRUE(LowerRope(made[i]->args(), nullptr, &lowered[i]).ok());
  }
  const auto remember = [&](size_t i) { return calls->Remember(made[i]->args(), lowered[i]); };
  const auto find = [&](size_t i) { return calls->Find(made[i]->args(), nullptr); };
  for (size_t i = 0; i < 5; ++i) ASSERT_NE(remember(i), nullptr);
  EXPECT_EQ(find(0), nullptr) << "the fifth takes the place of the first";
  for (size_t i = 1; i < 5; ++i) EXPECT_NE(find(i), nullptr) << i;

  // Each number is a shape's own.
  EXPECT_NE(find(1)->call.shape, find(2)->call.shape);

  const KnownCalls::Use use1(find(1)), use2(find(2)), use3(find(3));
  EXPECT_EQ(find(1), nullptr) << "in use";
  KnownCalls::Known* const fifth = remember(5);
  ASSERT_NE(fifth, nullptr) << "the place of call 4";
  EXPECT_EQ(find(4), nullptr);
  {
    const KnownCalls::Use use(fifth);
    EXPECT_EQ(remember(0), nullptr) << "every place is in use";
  }
  EXPECT_NE(remember(0), nullptr);
}

}  // namespace
}  // namespace ropewalk
